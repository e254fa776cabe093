import pytest
import torch

from agrepa_fast.kernels import ada_norm, force_backend, gated_residual
from agrepa_fast.kernels._launch import TILES, Tile

from .accuracy import DEVICE, assert_as_accurate, assert_repeatable, fused_backends

# (N, C, T, D), gated, per frame, dtype. The gradient of m has one number per row: its RMS error needs enough rows.
CASES = [
    ((36, 3, 1, 24), True, True, torch.float32),  # one token
    ((12, 3, 37, 40), True, False, torch.float32),  # T beyond a chunk of 32, D beyond a power of two
    ((12, 3, 37, 40), True, False, torch.bfloat16),
    ((12, 3, 37, 40), True, True, torch.bfloat16),
    ((12, 3, 37, 40), False, False, torch.float32),
    ((12, 3, 37, 40), False, True, torch.bfloat16),
    ((6, 1, 3, 2100), False, False, torch.float32),  # one row per tile
    ((18, 3, 33, 21), True, False, torch.bfloat16),  # D no multiple of a vector
]


def fused_inputs(n, c, t, d, dtype, per_frame=False, gated=True):
    """Return strided rows of h and f, chunks of one modulation, gates of every kind, lengths that end in a chunk."""
    torch.manual_seed(0)
    wide = torch.randn(n, t, 2 * d, device=DEVICE)
    modulation = torch.randn(*((c, t, 3 * d) if per_frame else (c, 3 * d)), device=DEVICE)
    inputs = {"wide": (wide + 2).to(dtype), "modulation": modulation.to(dtype)}
    if gated:
        inputs["m"] = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25, 0.75], device=DEVICE).repeat(n // 6)
    inputs["lengths"] = (torch.tensor([t, 1, t // 2 + 1], device=DEVICE)[:c]).clamp(max=t)
    return inputs


def full(wide, modulation, lengths, m=None):
    h, f = wide.chunk(2, dim=-1)
    gate, scale, shift = modulation.chunk(3, dim=-1)
    return gated_residual(h, f, gate, m, scale=scale, shift=shift, lengths=lengths, time_sum=True)


def block_end(wide, modulation, lengths, m=None):
    h, f = wide.chunk(2, dim=-1)
    return gated_residual(h, f, modulation.chunk(3, dim=-1)[0], m).h


def gradients(inputs, outputs):
    n, t, d = *inputs["wide"].shape[:2], inputs["wide"].shape[2] // 2
    return [torch.randn(*shape, device=DEVICE) for shape in [(n, t, d), (n, t, d), (n, d)][:outputs]]


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(("shape", "gated", "per_frame", "dtype"), CASES, ids=str)
def test_as_accurate_as_the_reference(shape, gated, per_frame, dtype, backend):
    inputs = fused_inputs(*shape, dtype, per_frame, gated)
    assert_as_accurate(full, inputs, gradients(inputs, 3), backend)


@pytest.mark.parametrize(
    ("tile", "backward_tile"),
    [
        (Tile(1, 1, 1, 16), Tile(2, 8)),
        pytest.param(Tile(4, 8), TILES["gated_residual_bwd"], marks=pytest.mark.drill),
        pytest.param(Tile(2, 4), Tile(1, 4, 3, 32), marks=pytest.mark.drill),
    ],
    ids=str,
)
def test_every_tile_is_as_accurate(tile, backward_tile, monkeypatch):
    """Several steps per program, which ends beyond the last frame."""
    monkeypatch.setitem(TILES, "gated_residual_fwd", tile)
    monkeypatch.setitem(TILES, "gated_residual_bwd", backward_tile)
    inputs = fused_inputs(6, 3, 37, 520, torch.float32)
    assert_as_accurate(full, inputs, gradients(inputs, 3), "triton")


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(("gated", "dtype"), [(False, torch.bfloat16), (True, torch.float32)], ids=str)
def test_block_end_as_accurate_as_the_reference(gated, dtype, backend):
    inputs = fused_inputs(6, 3, 37, 40, dtype, gated=gated)
    assert_as_accurate(block_end, inputs, gradients(inputs, 1), backend)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("used", [0, 1, 2])
def test_outputs_that_nothing_uses_send_no_gradient(used, backend):
    inputs = fused_inputs(6, 3, 37, 40, torch.float32)
    assert_as_accurate(lambda **given: full(**given)[used], inputs, [gradients(inputs, 3)[used]], backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend):
    inputs = fused_inputs(6, 3, 70, 40, torch.float32)
    assert_repeatable(full, inputs, gradients(inputs, 3), backend)


@pytest.mark.parametrize("backend", [*fused_backends(), "reference"])
def test_gate_zero_hands_on_the_input_and_its_gradient_whatever_the_branch_holds(backend):
    h, f, gate = (x.requires_grad_() for x in inputs())
    with torch.no_grad():
        f[1], f[4], h[4, 0, 0] = float("nan"), float("inf"), -0.0
    with force_backend(backend):
        out = gated_residual(h, f, gate, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])).h
        out.backward(torch.ones_like(out))
    off, on = [1, 4], [0, 2, 3, 5]
    assert torch.equal(out[off].view(torch.int32), h[off].view(torch.int32))
    assert out[on].isfinite().all()
    assert torch.equal(h.grad, torch.ones_like(h))
    assert torch.equal(f.grad[off], torch.zeros_like(f[off]))
    wanted = torch.stack([f[[0, 3]].sum((0, 1)), torch.zeros(8), f[[2, 5]].sum((0, 1))])  # condition 1: both rows off
    torch.testing.assert_close(gate.grad, wanted)


def test_registered_correctly():
    h, f, gate = (x.requires_grad_() for x in inputs())
    m, scale, shift = torch.rand(6, requires_grad=True), *torch.randn(2, 3, 8).requires_grad_()
    lengths = torch.tensor([5, 2, 1])
    for arguments in (
        (h, f, gate, m, scale, shift, lengths, True, 1e-6),
        (h, f, gate, None, None, None, None, False, 1e-6),
    ):
        torch.library.opcheck(torch.ops.agrepa.gated_residual.default, arguments)


def inputs(n=6, c=3, t=5, d=8):
    return torch.randn(n, t, d), torch.randn(n, t, d), torch.randn(c, d)


def test_adds_the_gated_branch_of_the_rows_condition():
    h, f, gate = inputs()
    m = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.0, 0.75])
    out = gated_residual(h, f, gate, m).h
    for row in range(6):
        torch.testing.assert_close(out[row], h[row] + m[row] * gate[row % 3] * f[row])


def test_next_norm_and_masked_time_sum():
    h, f, gate = inputs()
    scale, shift, lengths = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([5, 2, 1])
    f[1, 2:] = 1e6  # padding of condition 1: must not reach the sum
    out = gated_residual(h, f, gate, scale=scale, shift=shift, lengths=lengths, time_sum=True)
    torch.testing.assert_close(out.y, ada_norm(out.h, scale, shift))
    for row in range(6):
        torch.testing.assert_close(out.time_sum[row], out.h[row, : lengths[row % 3]].sum(0))


def test_gradients():
    h, f = (torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate, scale, shift = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    m = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)

    def call(h, f, gate, scale, shift):
        out = gated_residual(h, f, gate, m, scale=scale, shift=shift)
        return out.h, out.y

    assert torch.autograd.gradcheck(call, (h, f, gate, scale, shift))


def test_says_what_is_wrong():
    h, f, gate = inputs()
    with pytest.raises(ValueError, match=r"m is \(3,\), wanted \(6,\)"):
        gated_residual(h, f, gate, torch.ones(3))
    with pytest.raises(ValueError, match="come together"):
        gated_residual(h, f, gate, scale=torch.randn(3, 8))
