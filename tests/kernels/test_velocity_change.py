import pytest
import torch

from agrepa_fast.kernels import force_backend, velocity_change

from .accuracy import DEVICE, Guard, fused_backends, guarded, rms

# (V, C, T, M, lengths): one frame; clips past two pieces of 4096 elements, bins no power of two, a length inside each
# piece, on none and beyond the frames; every frame valid
SHAPES = [(1, 1, 1, 3, (1,)), (5, 4, 101, 97, (101, 50, 1, 300)), (3, 2, 43, 100, None)]


def inputs(count, clips, frames, bins, lengths, dtype=torch.float32):
    """Views of wider tensors, as slices of one batch of velocities are; NaN in the padding."""
    torch.manual_seed(0)
    rows = torch.randn(count + 1, clips, frames, bins, device=DEVICE)
    rows[1:] = rows[0] + 0.1 * rows[1:]  # the difference matters, not the velocities
    if lengths is not None:
        lengths = torch.tensor(lengths, device=DEVICE)
        rows[:, torch.arange(frames, device=DEVICE) >= lengths[:, None]] = float("nan")
    rows = rows.to(dtype)
    return rows[1:], rows[0], lengths


def run(backend, variants, base, lengths):
    with force_backend(backend), Guard(), torch.no_grad():
        return velocity_change(guarded(variants), guarded(base), lengths)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_the_reference(shape, dtype, backend):
    variants, base, lengths = inputs(*shape, dtype)
    fused = run(backend, variants, base, lengths)
    plain = run("reference", variants, base, lengths)
    exact = run("reference", variants.double(), base.double(), lengths)
    assert fused.dtype == plain.dtype == torch.float32
    assert rms(fused - exact) <= 1.5 * rms(plain - exact) + 1e-7 * rms(exact)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("layout", ["batch", "clips last", "frames last", "expanded"])
def test_any_strides(layout, backend):
    """As sliced from one batch, with strides over variants and clips of their own, not packed, and one for all."""
    variants, base, lengths = inputs(3, 2, 50, 100, (50, 20))
    wanted = run("reference", variants, base, lengths)
    if layout == "clips last":
        variants = variants.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "frames last":
        variants, base = (v.transpose(-1, -2).contiguous().transpose(-1, -2) for v in (variants, base))
    elif layout == "expanded":
        variants, wanted = variants[:1].expand(3, -1, -1, -1), wanted[:1].expand(3, -1)
    with force_backend(backend):
        torch.testing.assert_close(velocity_change(variants, base, lengths), wanted)


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend):
    case = inputs(3, 2, 120, 100, (120, 77))
    assert torch.equal(run(backend, *case), run(backend, *case))


@pytest.mark.parametrize("backend", [*fused_backends(), "reference"])
def test_is_the_relative_norm_over_valid_frames(backend):
    base, variants = torch.randn(3, 6, 4, device=DEVICE), torch.randn(5, 3, 6, 4, device=DEVICE)
    lengths = torch.tensor([6, 3, 1], device=DEVICE)
    base[1, 3:] = float("nan")  # padding may hold anything
    variants[:, 2, 1:] = float("inf")
    with force_backend(backend):
        change = velocity_change(variants, base, lengths)
    for k in range(5):
        for c, length in enumerate(lengths):
            a, b = variants[k, c, :length], base[c, :length]
            torch.testing.assert_close(change[k, c], (a - b).norm() / (b.norm() + 1e-8))


@pytest.mark.parametrize("backend", [*fused_backends(), "reference"])
def test_is_fp32_and_zero_for_equal_velocities(backend):
    v = torch.randn(2, 3, 4, dtype=torch.bfloat16, device=DEVICE)
    v[1] = 0  # eps keeps 0 / 0 away
    with force_backend(backend):
        change = velocity_change(v[None], v)
    assert change.dtype == torch.float32
    assert torch.equal(change, torch.zeros(1, 2, device=DEVICE))


@pytest.mark.parametrize("backend", fused_backends())
def test_gradients_are_never_missing(backend):
    variants, base, lengths = inputs(2, 2, 6, 4, (6, 3))
    with force_backend(backend):
        leaf = variants.clone().requires_grad_()
        velocity_change(leaf, base, lengths).sum().backward()
        assert leaf.grad[0, 0].abs().sum() > 0
        leaf = base.clone().requires_grad_()
        velocity_change(variants, leaf, lengths).sum().backward()
        assert leaf.grad[0].abs().sum() > 0


def test_reference_gradients():
    variants, base = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 4, 3), (2, 4, 3))
    )
    assert torch.autograd.gradcheck(lambda v, b: velocity_change(v, b, torch.tensor([4, 2])), (variants, base))


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2])])
def test_registered_correctly(lengths):
    operator = torch.ops.agrepa.velocity_change.default
    torch.library.opcheck(operator, (torch.randn(3, 2, 4, 5), torch.randn(2, 4, 5), lengths, 1e-8))


@pytest.mark.parametrize(
    ("variants", "base", "lengths", "message"),
    [
        (torch.randn(2, 3, 4, 5), torch.randn(3, 4, 6), None, r"variants \(2, 3, 4, 5\) must be \(V, \*\(3, 4, 6\)\)"),
        (torch.randn(3, 4, 5), torch.randn(4, 5), None, "must be"),
        (torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5).bfloat16(), None, "base is torch.bfloat16 on cpu: wanted one"),
        (torch.ones(2, 3, 4, 5).long(), torch.ones(3, 4, 5).long(), None, "one floating-point dtype"),
        (torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5), torch.ones(2), r"lengths is \(2,\), wanted \(3,\)"),
    ],
)
def test_says_what_was_wanted(variants, base, lengths, message):
    with pytest.raises(ValueError, match=message):
        velocity_change(variants, base, lengths)
