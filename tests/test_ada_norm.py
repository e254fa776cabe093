import pytest
import torch

from agrepa_fast.kernels import ada_norm

# (N, C, T, D): rows over fewer conditions, one token, D not a power of two
SHAPES = [(6, 3, 5, 8), (2, 2, 1, 6), (4, 1, 3, 10)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_frame", [False, True])
def test_matches_the_formula_row_by_row(shape, per_frame):
    n, c, t, d = shape
    x = torch.randn(n, t, d, dtype=torch.float64)
    packed = torch.randn(c, t, 2 * d, dtype=torch.float64) if per_frame else torch.randn(c, 2 * d, dtype=torch.float64)
    scale, shift = packed.chunk(2, dim=-1)  # views with a row stride of 2 D, as in the model
    y = ada_norm(x, scale, shift)
    for row in range(n):
        centred = x[row] - x[row].mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(y[row], normed * (1 + scale[row % c]) + shift[row % c])


def test_gradients():
    x, scale, shift = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 5), (2, 5), (2, 5)))
    assert torch.autograd.gradcheck(ada_norm, (x, scale, shift))


def test_refuses_rows_that_the_conditions_do_not_divide():
    with pytest.raises(ValueError, match="5 rows over 2 conditions"):
        ada_norm(torch.randn(5, 3, 4), torch.randn(2, 4), torch.randn(2, 4))
