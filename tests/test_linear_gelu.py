import math

import pytest
import torch

from agrepa_fast.kernels import linear_gelu

FORMS = {
    "erf": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}


@pytest.mark.parametrize("gelu", FORMS)
def test_matches_the_formula(gelu):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,)))
    torch.testing.assert_close(linear_gelu(x, weight, bias, gelu), FORMS[gelu](x @ weight.T + bias))


@pytest.mark.parametrize("gelu", FORMS)
def test_gradients(gelu):
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(lambda *a: linear_gelu(*a, gelu), args)


def test_refuses_another_gelu():
    with pytest.raises(ValueError, match="erf or tanh"):
        linear_gelu(torch.randn(1, 4), torch.randn(5, 4), torch.randn(5), "relu")
