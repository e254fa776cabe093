import math

import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.kernels import force_backend, linear_gelu

from .accuracy import DEVICE, assert_as_accurate, assert_repeatable, fused_backends

FORMS = {
    "erf": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}
# (N, T, K, E), gelu, dtype
CASES = [
    ((1, 1, 8, 16), "erf", torch.bfloat16),  # one row
    ((1, 77, 24, 1030), "erf", torch.float32),  # odd rows beyond a chunk of 64, columns beyond a tile of 1024
    ((1, 77, 24, 1030), "erf", torch.bfloat16),
    ((1, 77, 24, 1030), "tanh", torch.float32),
    ((1, 77, 24, 1030), "tanh", torch.bfloat16),
    ((1, 19, 5, 3), "tanh", torch.float32),  # fewer columns than a vector
]


def inputs(n, t, k, e, dtype):
    torch.manual_seed(0)
    x = torch.randn(n, t, k, device=DEVICE)
    weight = 2 * torch.randn(e, 2 * k, device=DEVICE) / k**0.5  # z spans both branches of erf and tanh
    bias = torch.randn(e, device=DEVICE)
    values = {"x": x, "weight": weight, "bias": bias}
    return {name: value.to(dtype) for name, value in values.items()}, [torch.randn(n, t, e, device=DEVICE)]


def call_with(gelu):
    return lambda x, weight, bias: linear_gelu(x, weight.chunk(2, dim=-1)[1], bias, gelu)  # rows of a wider tensor


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(("shape", "gelu", "dtype"), CASES, ids=str)
def test_as_accurate_as_the_reference(shape, gelu, dtype, backend):
    assert_as_accurate(call_with(gelu), *inputs(*shape, dtype), backend)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy, of the interpreter's polynomial where the other branch holds
@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("gelu", FORMS)
def test_far_out_and_at_zero(gelu, backend):
    z = torch.tensor([[0.0, -0.0, 1e-6, -6.0, 6.0, -14.0, 100.0, -100.0, 1e5, -1e5]], device=DEVICE).T.requires_grad_()
    one = torch.ones(1, 1, device=DEVICE)
    with force_backend(backend):
        y = linear_gelu(z, one, None, gelu)
        (slope,) = torch.autograd.grad(y, z, torch.ones_like(y))
    exact = z.detach().double().requires_grad_()
    wanted = FORMS[gelu](exact)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(wanted.sum(), exact)[0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", fused_backends())
def test_without_a_bias(backend):
    tensors, gradients = inputs(2, 77, 24, 265, torch.float32)
    del tensors["bias"]
    assert_as_accurate(lambda x, weight: call_with("erf")(x, weight, None), tensors, gradients, backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_z_is_kept_only_for_a_backward(backend):
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((37, 24), (265, 24), (265,)))
    with force_backend(backend):
        y, z = torch.ops.agrepa.linear_gelu(x, weight, bias, False, True)
        alone, nothing = torch.ops.agrepa.linear_gelu(x, weight, bias, False, False)
    assert torch.equal(y, alone)
    assert nothing.numel() == 0
    torch.testing.assert_close(z, x @ weight.T)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("trained", range(3))
def test_gradients_of_what_is_trained_only(trained, backend):
    tensors = [torch.randn(*s, device=DEVICE) for s in ((37, 24), (265, 24), (265,))]
    wanted = [t.clone().requires_grad_() for t in tensors]
    tensors[trained].requires_grad_()
    dy = torch.randn(37, 265, device=DEVICE)
    with force_backend(backend):
        linear_gelu(*tensors, "erf").backward(dy)
    with force_backend("reference"):
        linear_gelu(*wanted, "erf").backward(dy)
    assert [t.grad is not None for t in tensors] == [i == trained for i in range(3)]
    torch.testing.assert_close(tensors[trained].grad, wanted[trained].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", fused_backends())
def test_any_gradient_and_any_rows(backend):
    """An expanded gradient, transposed rows, and no rows at all."""
    x, weight = torch.randn(7, 24, 5, device=DEVICE).mT.requires_grad_(), torch.randn(9, 24, device=DEVICE)
    with force_backend(backend):
        (dx,) = torch.autograd.grad(linear_gelu(x, weight, None).sum(), x)
        assert linear_gelu(x[:0], weight, None).shape == (0, 5, 9)
        bias = torch.randn(9, device=DEVICE, requires_grad=True)
        assert torch.autograd.grad(linear_gelu(x[:0], weight, bias).sum(), bias)[0].count_nonzero() == 0
    (wanted,) = torch.autograd.grad(F.gelu(F.linear(x, weight)).sum(), x)
    torch.testing.assert_close(dx, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("gelu", FORMS)
def test_repeatable(gelu, backend):
    assert_repeatable(call_with(gelu), *inputs(1, 77, 24, 40, torch.float32), backend)


@pytest.mark.parametrize("backend", [*fused_backends(), "reference"])
def test_autocast_takes_its_dtype_as_a_linear_layer_does(backend):
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(9, 8, device=DEVICE, requires_grad=True)
    bias = torch.randn(9, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bias is torch.bfloat16, wanted x's torch.float32"):
        linear_gelu(x, weight, bias)
    with force_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        y, wanted = linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias))
    assert y.dtype == wanted.dtype == torch.bfloat16
    with force_backend(backend):
        y.sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("gelu", FORMS)
def test_matches_the_formula(gelu):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,)))
    torch.testing.assert_close(linear_gelu(x, weight, bias, gelu), FORMS[gelu](x @ weight.T + bias))


@pytest.mark.parametrize("gelu", FORMS)
def test_reference_gradients(gelu):
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(lambda *a: linear_gelu(*a, gelu), args)


@pytest.mark.parametrize("bias", [True, False])
def test_registered_correctly(bias):
    shapes = (6, 8), (9, 8), (9,)
    x, weight, b = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in shapes)
    b = b if bias else None
    torch.library.opcheck(torch.ops.agrepa.linear_gelu.default, (x, weight, b, True, True))
    dy, z = torch.randn(6, 9, device=DEVICE), torch.randn(6, 9, device=DEVICE)
    torch.library.opcheck(torch.ops.agrepa.linear_gelu_backward.default, (dy, z, b if b is None else b.detach(), False))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "gelu", "message"),
    [
        ((1, 4), (5, 4), (5,), "relu", "erf or tanh"),
        ((1, 4), (5, 3), (5,), "erf", r"weight is \(5, 3\), wanted \(E, 4\)"),
        ((1, 4), (5, 4), (4,), "erf", r"bias is \(4,\), wanted \(5,\)"),
        ((), (5, 4), (5,), "erf", r"x is torch.float32 \(\), wanted floating point"),
    ],
)
def test_says_what_was_wanted(x, weight, bias, gelu, message):
    with pytest.raises(ValueError, match=message):
        linear_gelu(torch.randn(x), torch.randn(weight), torch.randn(bias), gelu)


def test_refuses_strided_weights_and_integers():
    with pytest.raises(ValueError, match="weight has stride 5 in its last dimension"):
        linear_gelu(torch.randn(2, 4), torch.randn(4, 5).T, None)
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        linear_gelu(torch.ones(2, 4, dtype=torch.int64), torch.randn(5, 4), None)
