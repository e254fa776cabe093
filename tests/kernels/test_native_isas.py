"""The CPU library on the narrower instruction sets that this machine runs, and on any number of threads."""

import importlib
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from agrepa_fast.kernels import (
    _native,
    ada_norm,
    align_loss,
    flow_mix,
    force_backend,
    gated_residual,
    linear_gelu,
    qk_norm_rope,
    velocity_change,
)

if _native.LIBRARY is None or torch.cuda.is_available():
    pytest.skip("the CPU library", allow_module_level=True)

NARROWER = _native.ISAS[: _native.LIBRARY.agrepa_isa()]  # the machine's own runs in every other test
N, C, T, D = 4, 2, 70, 131  # enough elements for several threads, 280 rows, and an odd number of chunks a row


def random_rows(width: int = D) -> torch.Tensor:
    return torch.randn(N, T, width)


def ada_norm_case():
    return lambda x, m: ada_norm(x, *m.unbind(-2)), {"x": random_rows(), "m": torch.randn(C, 2, D)}


def gated_residual_case():
    def call(h, f, m, lengths):
        gate, scale, shift = m.unbind(-2)
        return gated_residual(h, f, gate, scale=scale, shift=shift, lengths=lengths, time_sum=True)

    return call, {"h": random_rows(), "f": random_rows(), "m": torch.randn(C, 3, D), "lengths": torch.tensor([T, 33])}


def qk_norm_rope_case():
    rope = torch.randn(T, 10), torch.randn(T, 10)
    weights = {"q_weight": torch.randn(20), "k_weight": torch.randn(20)}
    return lambda qkv, **weights: qk_norm_rope(qkv, 7, rope, **weights), {"qkv": random_rows(420), **weights}


def linear_gelu_case():
    """The elementwise part: torch's product of small integers is exact on any number of threads."""
    x, weight = torch.randint(-3, 4, (N, T, 16)).float(), torch.randint(-3, 4, (D, 16)).float() / 4
    return lambda bias: linear_gelu(x.to(bias.dtype), weight.to(bias.dtype), bias), {"bias": torch.randn(D)}


def align_loss_case():
    """Heads are identities: torch's products with one term are exact on any number of threads."""
    same = torch.eye(D).expand(2, D, D)
    heads = {"w1": same, "b1": torch.zeros(2, D), "w2": same, "b2": torch.zeros(2, D)}
    others = {"weights": torch.ones(2), "mask": torch.arange(N * T) % 3 != 1}
    teacher = torch.randn(N * T, D)

    def call(hidden):
        weights = {name: head.to(hidden.dtype) for name, head in heads.items()}
        return align_loss(hidden, teacher=teacher, **weights, **others)

    return call, {"hidden": torch.randn(2, N * T, D)}


def velocity_change_case():
    variants = torch.randn(6, C, T, D)
    inputs = {"variants": variants, "base": torch.randn(C, T, D)}
    return lambda variants, base: velocity_change(variants.detach(), base.detach()), inputs


def flow_mix_case():
    return lambda x: flow_mix(x, torch.linspace(0, 1, N), torch.arange(N)), {"x": random_rows()}


CASES = {
    "ada_norm": ada_norm_case,
    "align_loss": align_loss_case,
    "flow_mix": flow_mix_case,
    "gated_residual": gated_residual_case,
    "linear_gelu": linear_gelu_case,
    "qk_norm_rope": qk_norm_rope_case,
    "velocity_change": velocity_change_case,
}


def results(call, inputs: dict[str, torch.Tensor], threads: int) -> list[torch.Tensor]:
    """Return outputs and gradients of call(**inputs) on the CPU library."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with force_backend("native"):
            outputs = call(**leaves)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            followed = [output for output in outputs if output.requires_grad]
            torch.autograd.backward(followed, [output.detach().cos() for output in followed])
    finally:
        torch.set_num_threads(before)
    return outputs + [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", CASES)
def test_results_do_not_depend_on_the_number_of_threads(operation, dtype):
    torch.manual_seed(0)
    call, inputs = CASES[operation]()
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    one, two, three = (results(call, inputs, threads) for threads in (1, 2, 3))
    for i, value in enumerate(one):
        assert torch.equal(value, two[i]), i
        assert torch.equal(value, three[i]), i


def native_cases(test) -> Iterator[dict]:
    """Yield the arguments of a parametrised test's cases on the native backend."""
    axes = []
    for mark in test.pytestmark:
        names = mark.args[0]
        if isinstance(names, str):
            axes.append([{names: value} for value in mark.args[1]])
        else:
            axes.append([dict(zip(names, values, strict=True)) for values in mark.args[1]])
    for parts in product(*axes):
        case = {name: value for part in parts for name, value in part.items()}
        if case["backend"] == "native":
            yield case


@pytest.mark.parametrize("isa", NARROWER)
@pytest.mark.parametrize("operation", CASES)
def test_narrower_instruction_sets_are_as_accurate(operation, isa, monkeypatch):
    """Run the operation's own accuracy test, with its shapes."""
    called, function = [], _native._function
    monkeypatch.setattr(_native, "_function", lambda *names: (called.append(names), function(*names))[1])
    test = importlib.import_module(f"{__package__}.test_{operation}").test_as_accurate_as_the_reference
    with _native.force_isa(isa):
        cases = list(native_cases(test))
        for case in cases:
            test(**case)
    assert len(called) >= len(cases)
    assert {used for _, _, used in called} == {isa}


def test_an_instruction_set_that_the_machine_lacks_is_refused():
    with pytest.raises(ValueError, match="'avx1024' does not run here"), _native.force_isa("avx1024"):
        pass
