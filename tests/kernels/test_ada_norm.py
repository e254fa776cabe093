import pytest
import torch

from agrepa_fast.kernels import ada_norm
from agrepa_fast.kernels._launch import TILES, Tile

from .accuracy import DEVICE, assert_as_accurate, assert_repeatable, fused_backends

# (N, C, T, D), per frame, dtype
CASES = [
    ((2, 2, 1, 24), True, torch.float32),  # one token
    ((4, 2, 37, 40), False, torch.float32),  # T beyond a chunk of 32, D beyond a power of two
    ((4, 2, 37, 40), False, torch.bfloat16),
    ((4, 2, 37, 40), True, torch.bfloat16),
    ((2, 1, 3, 2100), False, torch.float32),  # one row per tile
    ((1, 1, 3, 3), False, torch.bfloat16),  # D below a vector
]


def inputs(n, c, t, d, dtype, per_frame):
    torch.manual_seed(0)
    modulation = torch.randn(*((c, t, 2 * d) if per_frame else (c, 2 * d)), device=DEVICE)
    x = torch.randn(n, t, 2 * d, device=DEVICE) + 3  # a mean that matters; rows of a wider tensor
    return {"x": x.to(dtype), "modulation": modulation.to(dtype)}, [torch.randn(n, t, d, device=DEVICE)]


def call(x, modulation):
    return ada_norm(x.chunk(2, dim=-1)[1], *modulation.chunk(2, dim=-1))  # .chunk() views, as in the model


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(("shape", "per_frame", "dtype"), CASES, ids=str)
def test_as_accurate_as_the_reference(shape, per_frame, dtype, backend):
    assert_as_accurate(call, *inputs(*shape, dtype, per_frame), backend)


@pytest.mark.parametrize(
    ("tile", "backward_tile"),
    [(Tile(4, 8), TILES["ada_norm_bwd"]), (Tile(2, 4), Tile(2, 8)), (Tile(1, 1), Tile(1, 4, 3, 32))],
    ids=str,
)
def test_every_tile_is_as_accurate(tile, backward_tile, monkeypatch):
    """Several steps per program, which ends beyond the last frame."""
    monkeypatch.setitem(TILES, "ada_norm_fwd", tile)
    monkeypatch.setitem(TILES, "ada_norm_bwd", backward_tile)
    assert_as_accurate(call, *inputs(2, 1, 37, 520, torch.float32, False), "triton")


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend):
    assert_repeatable(call, *inputs(4, 2, 70, 40, torch.float32, False), backend)


@pytest.mark.parametrize("per_frame", [False, True])
def test_matches_the_formula_row_by_row(per_frame):
    n, c, t, d = 6, 3, 5, 10
    x = torch.randn(n, t, d, dtype=torch.float64)
    packed = torch.randn(c, t, 2 * d, dtype=torch.float64) if per_frame else torch.randn(c, 2 * d, dtype=torch.float64)
    scale, shift = packed.chunk(2, dim=-1)  # views with a row stride of 2 D, as in the model
    y = ada_norm(x, scale, shift)
    for row in range(n):
        centred = x[row] - x[row].mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(y[row], normed * (1 + scale[row % c]) + shift[row % c])


def test_reference_gradients():
    x, scale, shift = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 5), (2, 5), (2, 5)))
    assert torch.autograd.gradcheck(ada_norm, (x, scale, shift))


def test_registered_correctly():
    torch.library.opcheck(
        torch.ops.agrepa.ada_norm.default,
        (torch.randn(4, 3, 8, requires_grad=True), *(torch.randn(2, 8, requires_grad=True) for _ in range(2)), 1e-6),
    )


@pytest.mark.parametrize(
    ("x", "scale", "shift", "message"),
    [
        ((5, 3, 4), (2, 4), (2, 4), "5 rows over 2 conditions"),
        ((4, 3, 4), (2, 5), (2, 5), r"scale is \(2, 5\), wanted \(C, 4\)"),
        ((4, 3, 4), (2, 2, 4), (2, 2, 4), r"wanted \(C, 3, 4\)"),
        ((4, 3, 4), (2, 4), (1, 4), "wanted that of scale"),
        ((4, 4), (2, 4), (2, 4), r"x is \(4, 4\), wanted \(N, T, D\)"),
    ],
)
def test_says_what_was_wanted(x, scale, shift, message):
    with pytest.raises(ValueError, match=message):
        ada_norm(torch.randn(x), torch.randn(scale), torch.randn(shift))


def test_refuses_strided_and_integer_rows():
    m = torch.randn(2, 4)
    with pytest.raises(ValueError, match="stride 3 in its last dimension"):
        ada_norm(torch.randn(2, 4, 3).transpose(1, 2), m, m)
    with pytest.raises(ValueError, match=r"x is torch.int64, wanted float32"):
        ada_norm(torch.ones(2, 3, 4, dtype=torch.int64), m, m)
