"""kernels/_library.py and kernels/_launch.py: how operations are called, eager and traced, and how kernels start."""

import contextlib
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from agrepa_fast.kernels import _launch as launching
from agrepa_fast.kernels import (
    ada_norm,
    align_loss,
    align_loss_sum,
    flow_mix,
    force_backend,
    gated_residual,
    linear_gelu,
    qk_norm_rope,
    velocity_change,
)
from agrepa_fast.kernels._library import Operation, implementation, on_its_device

from .accuracy import DEVICE, fused_backends


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).requires_grad_()


def calls() -> dict[str, tuple]:
    """Return per operation a function of tensors and the tensors, of which those with requires_grad get gradients."""
    torch.manual_seed(0)
    m, lengths = torch.tensor([1.0, 0.0, 0.5, 1.0], device=DEVICE), torch.tensor([9, 3], device=DEVICE)
    rope = [torch.randn(9, 4, device=DEVICE) for _ in range(2)]
    heads = leaf(2, 6, 8), leaf(2, 6), leaf(2, 5, 6), leaf(2, 5)
    aligned = torch.randn(4, 5, device=DEVICE), torch.rand(2, device=DEVICE), m > 0

    def whole(h, f, gate, scale, shift):
        return gated_residual(h, f, gate, m, scale=scale, shift=shift, lengths=lengths, time_sum=True)

    def end(h, f, gate):
        return gated_residual(h, f, gate).h

    def normed(qkv, q_weight, k_weight):
        return qk_norm_rope(qkv, 2, rope, q_weight=q_weight, k_weight=k_weight)

    return {
        "ada_norm": (ada_norm, leaf(4, 9, 8), leaf(2, 8), leaf(2, 8)),
        "gated_residual": (whole, leaf(4, 9, 8), leaf(4, 9, 8), leaf(2, 8), leaf(2, 8), leaf(2, 8)),
        "gated_residual, end": (end, leaf(4, 9, 8), leaf(4, 9, 8), leaf(2, 8)),
        "qk_norm_rope": (normed, leaf(2, 9, 48), leaf(8), leaf(8)),
        "qk_norm_rope, no norm": (lambda qkv: qk_norm_rope(qkv, 2, rope), leaf(2, 9, 48)),
        "linear_gelu": (linear_gelu, leaf(2, 9, 8), leaf(16, 8), leaf(16)),
        "align_loss": (lambda *given: align_loss(*given, *aligned), leaf(2, 4, 8), *heads),
        "align_loss_sum": (lambda *given: align_loss_sum(*given, *aligned, m)[0], leaf(2, 4, 8), *heads),
        "flow_mix": (flow_mix, leaf(2, 9, 8), torch.rand(2, device=DEVICE), torch.arange(2, device=DEVICE)),
        "velocity_change": (
            velocity_change,
            torch.randn(3, 2, 9, 8, device=DEVICE),
            torch.randn(2, 9, 8, device=DEVICE),
        ),
    }


NAMES = list(calls())
DIFFERENTIABLE = [name for name in NAMES if name != "velocity_change"]


class Seen(TorchDispatchMode):
    """Records the operators of ours that are called inside it, and runs them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if implementation(func):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def results(call, *given) -> list[torch.Tensor]:
    """Return outputs and gradients of sums of squares of them."""
    outputs = call(*given)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o is not None]
    leaves = [x for x in given if x.requires_grad]
    if not leaves:
        return outputs
    return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)]


def refuse(*inputs):
    raise AssertionError("the dispatcher was called")


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("name", NAMES)
def test_an_eager_call_gives_the_operators_bits_without_the_dispatcher(name, backend, monkeypatch):
    with force_backend(backend):
        with Seen() as seen:
            wanted = results(*calls()[name])
        forward_backward = 1 if name in ("flow_mix", "velocity_change", "align_loss_sum") else 2
        assert len(seen.names) == forward_backward, seen.names
        for operation in operations():
            monkeypatch.setattr(operation, "operator", refuse)
        for got, want in zip(results(*calls()[name]), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_no_graph_is_made(name, backend, monkeypatch):
    for operation in operations():
        monkeypatch.setattr(operation, "operator", refuse)
    call, *given = calls()[name]
    with force_backend(backend):
        wanted = call(*given)
        with torch.no_grad():
            got = call(*given)
        frozen = call(*(x.detach() for x in given))
    for one in (got, frozen):
        for output, want in zip(tensors(one), tensors(wanted), strict=True):
            assert output.grad_fn is None
            assert torch.equal(output, want)


def tensors(outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else [output for output in outputs if output is not None]


def operations() -> list[Operation]:
    modules = [module for name, module in sys.modules.items() if name.startswith("agrepa_fast.kernels.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Operation)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_recomputed_in_the_backward(name):
    call, *given = calls()[name]

    def recomputed(*inputs):
        return checkpoint(lambda *again: tuple(tensors(call(*again))), *inputs, use_reentrant=False)

    for got, want in zip(results(recomputed, *given), results(call, *given), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_and_tracers_see_one_operator(name):
    call, *given = calls()[name]
    eager = tensors(call(*given))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tensors(call(*(mode.from_tensor(x) for x in given)))
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in eager]
    traced = make_fx(lambda *inputs: tensors(call(*inputs)))(*(x.detach() for x in given))
    ours = [node for node in traced.graph.nodes if "agrepa" in str(node.target)]
    assert len(ours) == 1, ours


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "flow_mix"])
def test_a_second_derivative_is_refused(name):
    """Also where only the saved tensors need a gradient: the first derivative's own gradient does not, here."""
    call, *given = calls()[name]
    outputs = tensors(call(*given))
    ones = [torch.ones_like(output) for output in outputs]
    first = torch.autograd.grad(outputs, [x for x in given if x.requires_grad], ones, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no second derivative on this backend: .*AGREPA_BACKEND=reference"):
        first[0].sum().backward()


def test_outputs_that_nothing_used_send_no_gradient():
    h, f, gate, scale, shift = (x.requires_grad_() for x in calls()["gated_residual"][1:])
    out = gated_residual(h, f, gate, scale=scale, shift=shift)
    (dscale,) = torch.autograd.grad(out.h.sum(), scale, retain_graph=True, allow_unused=True)
    assert dscale is None
    assert all(g is not None for g in torch.autograd.grad(out.y.sum(), (h, f, gate, scale, shift)))


def test_runs_on_the_gpu_of_its_first_tensor(monkeypatch):
    """Triton launches on the current GPU, whatever GPU the tensors are on."""
    current, seen = [0], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])

    def run(*inputs):
        seen.append(current[-1])

    class On:
        """A tensor of a GPU that is not here."""

        __class__ = torch.Tensor
        is_cuda = True

        def __init__(self, index):
            self.device = torch.device("cuda", index)

        def get_device(self):
            return self.device.index

    on_its_device(run)(None, On(1), On(1))
    on_its_device(run)(On(0))
    on_its_device(run)(torch.zeros(1))
    assert seen == [1, 0, 0]
    assert current == [0]


class Tensor:
    """What a launch asks of a tensor of a GPU."""

    def __init__(self, address=4096, dtype=torch.bfloat16, device=0):
        self.address, self.dtype, self.device = address, dtype, device

    def __repr__(self) -> str:  # names tests: the same in every process
        return f"tensor at {self.address}, {self.dtype}, device {self.device}"

    def data_ptr(self):
        return self.address

    def get_device(self):
        return self.device


class Kernel:
    """A kernel of Triton that counts its launches through Triton's launcher and as a compiled kernel."""

    arg_names = ("x_ptr", "y_ptr", "frames", "x_n", "D")
    function = packed_metadata = None

    def __init__(self):
        self.slow, self.fast = [], []

    def __getitem__(self, grid):
        def start(*arguments, **settings):
            self.slow.append((grid, arguments, settings))
            return self

        return start

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        self.fast.append(((x, y, z), arguments))


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching._C, "_cuda_getCurrentRawStream", lambda device: device, raising=False)
    return Kernel()


GRID = (3, 1, 1)


def start(kernel, x=None, y=None, frames=938, stride=64, **settings):
    launching.launch(kernel, GRID, (x or Tensor(), y), (frames,), (stride,), **({"D": 64, "num_warps": 4} | settings))


def test_a_second_launch_skips_tritons_launcher(kernel):
    start(kernel)
    start(kernel, frames=1, stride=128)
    assert (len(kernel.slow), len(kernel.fast)) == (1, 1)
    grid, (_, y, frames, stride, constant) = kernel.fast[0]
    assert (grid, y, frames, stride, constant) == (GRID, None, 1, 128, None)


@pytest.mark.parametrize(
    "other",
    [
        {"x": Tensor(dtype=torch.float32)},
        {"y": Tensor()},
        {"D": 128},
        {"num_warps": 8},
        {"x": Tensor(device=1)},
    ],
    ids=str,
)
def test_another_kind_of_launch_is_another_kernel(other, kernel):
    start(kernel)
    start(kernel, **other)
    start(kernel, **other)
    assert (len(kernel.slow), len(kernel.fast)) == (2, 1)


@pytest.mark.parametrize(
    "unusual", [{"x": Tensor(4104)}, {"stride": 1}, {"stride": 2**31}, {"x": Tensor(device=-1)}], ids=str
)
def test_what_triton_compiles_apart_goes_through_its_launcher(unusual, kernel):
    """Addresses and strides that are no multiples of 16, strides beyond 32 bits, and a CPU."""
    for _ in range(2):
        start(kernel)
        start(kernel, **unusual)
    assert (len(kernel.slow), len(kernel.fast)) == (3, 1)


def test_a_profilers_hook_sees_every_launch(kernel, monkeypatch):
    start(kernel)
    monkeypatch.setattr(launching.triton.knobs.runtime.launch_enter_hook, "calls", [print])
    start(kernel)
    assert (len(kernel.slow), len(kernel.fast)) == (2, 0)
