from importlib import import_module

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast.kernels import align_loss, force_backend
from agrepa_fast.kernels._library import implementation
from agrepa_fast.kernels.align_loss import align_loss_sum

from .accuracy import DEVICE, assert_as_accurate, assert_repeatable, fused_backends

K, N, D, H, E = 2, 5, 6, 7, 3
MODULE = import_module("agrepa_fast.kernels.align_loss")  # the package's attribute of that name is the function
FP32, BF16, MIXED = DTYPES = [  # of hidden states and heads
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
# (K, N, D, H, E), dtypes
CASES = [
    ((1, 16, 8, 40, 65), FP32),  # less than a chunk
    ((3, 37, 24, 40, 130), FP32),  # rows beyond a chunk of 32 in four tiles
    ((3, 37, 24, 40, 130), BF16),
    ((3, 37, 24, 40, 130), MIXED),
    ((2, 105, 24, 40, 33), FP32),  # four chunks
    ((2, 105, 24, 40, 33), MIXED),
]


def inputs(k, n, d, h, e, dtypes, teacher_dtype=torch.float32):
    """Return inputs whose rows 1, 4, 7 ... are of another domain, with a strided teacher."""
    torch.manual_seed(0)

    def draw(*shape, dtype=dtypes[1]):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    tensors = {
        "hidden": draw(k, n, d, dtype=dtypes[0]),
        "w1": draw(k, h, d),
        "b1": draw(k, h),
        "w2": draw(k, e, h),
        "b2": draw(k, e),
        "teacher": draw(n, e + 5, dtype=teacher_dtype),
        "weights": torch.rand(k, device=DEVICE),
        "mask": torch.arange(n, device=DEVICE) % 3 != 1,
    }
    tensors["hidden"][:, ::2] *= 3  # rows differ in length
    return tensors, [torch.randn(n, device=DEVICE)]


def narrowed(teacher, **others):
    return {"teacher": teacher[..., 5:], **others}


def rows(**tensors):
    return align_loss(**narrowed(**tensors))


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(("shape", "dtypes"), CASES, ids=str)
def test_as_accurate_as_the_reference(shape, dtypes, backend):
    assert_as_accurate(rows, *inputs(*shape, dtypes), backend)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_chunks_of_rows_and_of_heads_are_as_accurate(dtypes, backend, monkeypatch):
    """With 40 projected rows at a time, 69 rows give 40 and 29 per head, and 15 rows two heads, then one."""
    monkeypatch.setattr(MODULE, "PROJECTED", 40)
    assert_as_accurate(rows, *inputs(2, 69, 24, 40, 33, dtypes), backend)
    assert_as_accurate(rows, *inputs(3, 15, 24, 40, 33, dtypes), backend)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_teachers_of_any_dtype(dtype, backend):
    tensors, drows = inputs(2, 39, 6, 9, 33, DTYPES[0], dtype)
    tensors["teacher"][0] *= 1e-6  # subnormal in fp16
    assert_as_accurate(rows, tensors, drows, backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend):
    assert_repeatable(rows, *inputs(2, 39, 6, 9, 33, DTYPES[0]), backend)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_sums_gradients_are_bitwise_those_of_the_rows(dtypes, backend):
    """row_weights play the rows' gradients; then the sum gets a gradient that scales all of them."""
    tensors, (drows,) = inputs(2, 39, 6, 9, 33, dtypes)
    tensors = narrowed(**tensors)
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "w1", "b1", "w2", "b2")]
    with force_backend(backend):
        losses = align_loss(**tensors)
        wanted = torch.autograd.grad(losses, leaves, drows)
        total, each = align_loss_sum(row_weights=drows, **tensors)
        got = torch.autograd.grad(total, leaves, retain_graph=True)
        scaled = torch.autograd.grad(total, leaves, torch.tensor(-0.25, device=DEVICE))
    assert torch.equal(each, losses)
    assert not each.requires_grad
    torch.testing.assert_close(total, (drows * losses).sum())
    for a, b, c in zip(got, wanted, scaled, strict=True):
        assert a.dtype == b.dtype == c.dtype
        assert torch.equal(a, b)
        assert torch.equal(c, -0.25 * b)


def heads():
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, E)) for _ in range(K)]
    stacked = [torch.stack([getattr(m[i], name) for m in modules]) for i in (0, 2) for name in ("weight", "bias")]
    return modules, stacked


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def on_every_backend(test):
    return pytest.mark.parametrize("backend", [*fused_backends(), "reference"])(test)


@on_every_backend
def test_the_loss_is_the_weighted_sum_of_each_heads_distance(backend):
    modules, stacked = heads()
    hidden, teacher, weights = torch.randn(K, N, D), torch.randn(N, E), torch.tensor([0.7, 0.3])
    wanted = sum(w * (1 - cosine(m(h), teacher)) for w, m, h in zip(weights, modules, hidden, strict=True))
    with force_backend(backend):
        loss = align_loss(hidden, *stacked, teacher, weights, torch.ones(N, dtype=torch.bool))
    torch.testing.assert_close(loss, wanted)


@on_every_backend
@pytest.mark.parametrize("form", ["rows", "sum"])
def test_what_does_not_count_gives_exact_zeros_whatever_it_holds(form, backend):
    _, stacked = heads()
    stacked = [s.detach().requires_grad_() for s in stacked]
    hidden, teacher, counts = torch.randn(K, N, D), torch.randn(N, E), torch.tensor([True, False, True, False, True])
    hidden[:, ~counts], teacher[1], teacher[3] = float("nan"), float("nan"), float("inf")
    hidden.requires_grad_()

    def backward(mask):
        with force_backend(backend):
            if form == "rows":
                loss = align_loss(hidden, *stacked, teacher, torch.ones(K), mask)
                loss.sum().backward()
                return loss
            loss, each = align_loss_sum(hidden, *stacked, teacher, torch.ones(K), mask, torch.ones(N))
            loss.backward()
            return each

    loss = backward(counts)
    assert torch.equal(loss[~counts], torch.zeros(2))
    assert loss.isfinite().all()
    assert torch.equal(hidden.grad[:, ~counts], torch.zeros_like(hidden.grad[:, ~counts]))
    assert (hidden.grad[:, counts] != 0).any(-1).all()
    for parameter in stacked:
        assert parameter.grad.isfinite().all()
        parameter.grad = None
    backward(torch.zeros(N, dtype=torch.bool))  # a domain that is absent from the batch
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in stacked)


@on_every_backend
def test_zero_teachers_and_zero_projections_are_finite_and_as_in_torch(backend):
    _, (w1, b1, w2, b2) = heads()
    hidden, teacher = torch.randn(K, N, D), torch.randn(N, E)
    teacher[0] = 0
    w2, b2 = w2.detach().clone(), b2.detach().clone()
    w2[1], b2[1] = 0, 0  # the second head projects to zero
    results = []
    for name in (backend, "reference"):
        bias = b2.clone().requires_grad_()
        with force_backend(name):
            mask = torch.ones(N, dtype=torch.bool)
            loss = align_loss(hidden, w1, b1, w2, bias, teacher, torch.ones(K), mask)
            loss.sum().backward()
        results.append((loss.detach(), bias.grad))
    assert results[0][1].isfinite().all()
    torch.testing.assert_close(results[0], results[1])


@on_every_backend
def test_the_sum_is_the_weighted_sum_with_and_without_gradients(backend):
    _, stacked = heads()
    rest = torch.randn(N, E), torch.ones(K), torch.ones(N, dtype=torch.bool)
    hidden, row_weights = torch.randn(K, N, D, requires_grad=True), torch.tensor([0.3, 5.0, -1.2, 0.0, 1.0])
    with force_backend(backend):
        total, losses = align_loss_sum(hidden, *stacked, *rest, row_weights)
        with torch.no_grad():
            alone, each = align_loss_sum(hidden, *stacked, *rest, row_weights)
    assert total.requires_grad
    assert not losses.requires_grad
    torch.testing.assert_close(total, (row_weights * losses).sum())
    torch.testing.assert_close((alone, each), (total.detach(), losses))


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor made inside it, the operators' own tensors included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if ours := implementation(func):
            with self:
                return ours(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and func._schema.returns[0].alias_info is None:  # views are nothing new
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("summed", [False, True])
def test_nothing_of_the_size_of_all_projections_exists(summed, monkeypatch):
    monkeypatch.setattr(MODULE, "PROJECTED", 64)
    tensors, (drows,) = inputs(2, 600, 4, 40, 40, DTYPES[0])
    tensors = narrowed(**tensors)
    hidden = tensors["hidden"].requires_grad_()
    with force_backend(fused_backends()[-1]), Largest() as largest:
        loss = align_loss_sum(row_weights=drows, **tensors)[0] if summed else align_loss(**tensors)
        loss.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert largest.elements < 600 * 40 / 4, "wanted at most the states, or a chunk of projections"


def test_reference_gradients():
    tensors, _ = inputs(2, 3, 3, 4, 3, (torch.float64, torch.float64), torch.float64)
    tensors = narrowed(**tensors)
    names = ["hidden", "w1", "b1", "w2", "b2"]
    others = {name: value.double() if name == "weights" else value for name, value in tensors.items()}
    for name in names:
        del others[name]
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *a: align_loss(*a, **others), leaves)


def test_registered_correctly():
    tensors, _ = inputs(2, 3, 3, 4, 3, DTYPES[0])
    for name in ("hidden", "w1", "b1", "w2", "b2"):
        tensors[name].requires_grad_()
    tensors = {name: value[..., 5:] if name == "teacher" else value for name, value in tensors.items()}
    arguments = (*tensors.values(),)
    torch.library.opcheck(torch.ops.agrepa.align_loss.default, arguments)
    torch.library.opcheck(torch.ops.agrepa.align_loss_sum.default, (*arguments, torch.rand(3, device=DEVICE)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.randn(N + 1, E)}, "share rows"),
        ({"hidden": torch.randn(N, D)}, r"hidden is torch.float32 \(5, 6\), wanted floating point \(K, N, D\)"),
        ({"w1": torch.randn(K, H, D + 1)}, r"w1 is \(2, 7, 7\), wanted \(2, H, 6\)"),
        ({"b1": torch.randn(K, H + 1)}, r"b1 is \(2, 8\), wanted \(2, 7\)"),
        ({"w2": torch.randn(K, E, H + 1)}, r"w2 is \(2, 3, 8\), wanted \(2, 3, 7\)"),
        ({"b2": torch.randn(K, E + 1)}, r"b2 is \(2, 4\), wanted \(2, 3\)"),
        ({"b2": torch.randn(K, E).double()}, "b2 is torch.float64, wanted float32, bfloat16 or float64, the same"),
        ({"weights": torch.ones(K + 1)}, r"weights is \(3,\), wanted \(2,\)"),
        ({"mask": torch.ones(N)}, r"mask is torch.float32, wanted torch.bool"),
        ({"row_weights": torch.ones(N - 1)}, r"row_weights is \(4,\), wanted \(5,\)"),
        ({"teacher": torch.randn(E, N).T}, "teacher has stride 5"),
    ],
)
def test_says_what_was_wanted(change, message):
    _, (w1, b1, w2, b2) = heads()
    right = {"hidden": torch.randn(K, N, D), "w1": w1, "b1": b1, "w2": w2, "b2": b2, "teacher": torch.randn(N, E)}
    right |= {"weights": torch.ones(K), "mask": torch.ones(N, dtype=torch.bool), "row_weights": torch.ones(N)}
    with pytest.raises(ValueError, match=message):
        align_loss_sum(**(right | change))
