"""Every operation moves the elements of its header's Traffic line, no pass more; and the counter sees an added pass."""

import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.kernels import (
    ada_norm,
    flow_mix,
    gated_residual,
    linear_gelu,
    qk_norm_rope,
    velocity_change,
)
from agrepa_fast.kernels._backend import tl, triton

from .accuracy import FUSED
from .traffic import passes

if torch.cuda.is_available():
    pytest.skip("launches are counted in Triton's interpreter", allow_module_level=True)

N, C, T, D = 4, 2, 70, 40  # partial sums and modulations stay below half a pass
HEADS, WIDTH = 5, 8
backends = pytest.mark.parametrize("backend", FUSED)


def rows(width: int = D) -> torch.Tensor:
    return torch.randn(N, T, width)


def modulation() -> torch.Tensor:
    return torch.randn(C, 6, D)


def assert_moves(counted: dict[str, float], wanted: float) -> None:
    assert sum(counted.values()) == pytest.approx(wanted), counted


@backends
def test_ada_norm(backend):
    def call(x, packed):
        scale, shift, *_ = packed.unbind(-2)
        return ada_norm(x, scale, shift)

    x = rows()
    forward, backward = passes(call, {"x": x, "packed": modulation()}, x, backend)
    assert_moves(forward, 2)  # x; y
    assert_moves(backward, 3)  # dy, x; dx


@backends
@pytest.mark.parametrize("extras", [False, True])
def test_gated_residual_with_the_next_norm(backend, extras):
    """m and the time-sum add no pass."""

    def call(h, f, packed, m=None, lengths=None):
        gate, scale, shift, *_ = packed.unbind(-2)
        return gated_residual(h, f, gate, m, scale=scale, shift=shift, lengths=lengths, time_sum=extras)

    inputs = {"h": rows(), "f": rows(), "packed": modulation()}
    inputs |= {"m": torch.tensor([1.0, 0.0, 0.5, 1.0]), "lengths": torch.tensor([T, 33])} if extras else {}
    forward, backward = passes(call, inputs, inputs["h"], backend)
    assert_moves(forward, 4)  # h, f; h', y
    assert_moves(backward, 6)  # dh', dy, h', f; dh, df


@backends
@pytest.mark.parametrize("time_sum", [False, True])
def test_gated_residual_at_the_end_of_a_block(backend, time_sum):
    def call(h, f, packed):
        return gated_residual(h, f, packed.unbind(-2)[0], time_sum=time_sum)

    inputs = {"h": rows(), "f": rows(), "packed": modulation()}
    forward, backward = passes(call, inputs, inputs["h"], backend)
    assert_moves(forward, 3)  # h, f; h'
    assert_moves(backward, 4 if time_sum else 3)  # dh', f; df, and dh where it is not dh' itself


@backends
@pytest.mark.parametrize(("norm", "interleaved"), [(False, True), (True, False)])
def test_qk_norm_rope(backend, norm, interleaved):
    """In passes over q and k together."""

    rope = torch.randn(T, WIDTH // 2), torch.randn(T, WIDTH // 2)

    def call(qkv, **weights):
        return qk_norm_rope(qkv, HEADS, rope, interleaved=interleaved, **weights)

    inputs = {"qkv": rows(3 * D)}
    inputs |= {"q_weight": torch.randn(WIDTH), "k_weight": torch.randn(WIDTH)} if norm else {}
    forward, backward = passes(call, inputs, rows(2 * D), backend)
    # The counter takes each argument of the CPU library as a whole: 1/2 is for the v of qkv that nothing reads.
    unread = 1 / 2 if backend == "native" else 0
    dv_copy = 1 / 2 + 1 / 2  # read, and written into the packed gradient
    assert_moves(forward, 2 + unread)  # q, k of qkv; q, k
    assert_moves(backward, (3 + unread if norm else 2) + dv_copy)  # dq, dk, with a norm q, k; their gradients


@backends
def test_linear_gelu(backend):
    """In passes over z = x W^T + b, beside the operands of the three products."""

    def call(x, weight, bias):
        return linear_gelu(x, weight, bias)

    inputs = {"x": rows(8), "weight": torch.randn(4 * D, 8), "bias": torch.randn(4 * D)}  # x is far below half of z
    forward, backward = passes(call, inputs, rows(4 * D), backend)
    assert_moves(forward, 2)  # z; y
    assert_moves(backward, 3)  # dy, z; dz


@backends
def test_velocity_change(backend):
    def call(variants, base, lengths):
        return velocity_change(variants.detach(), base.detach(), lengths)

    variants = torch.randn(6, C, T, D)  # base, read once by each variant or once in all, is below half a pass
    inputs = {"variants": variants, "base": variants[0].clone(), "lengths": torch.tensor([T, T])}
    forward, _ = passes(call, inputs, variants, backend)
    assert_moves(forward, 1)


@backends
def test_flow_mix(backend):
    def call(x, t, keys):
        return tuple(part.detach() for part in flow_mix(x.detach(), t.detach(), keys))

    x = rows()
    forward, _ = passes(call, {"x": x, "t": torch.rand(N), "keys": torch.arange(N)}, x, backend)
    assert_moves(forward, 3)  # x; x_t, target


# The counter itself


@backends
def test_an_added_pass_is_counted(backend):
    def wasteful(x, packed):
        scale, shift, *_ = packed.unbind(-2)
        return ada_norm(x.clone(), scale, shift)

    x = rows()
    forward, backward = passes(wasteful, {"x": x, "packed": modulation()}, x, backend)
    assert_moves(forward, 4)
    assert_moves(backward, 3)


@backends
def test_an_added_pass_of_the_backward_is_counted(backend):
    def wasteful(x, packed):
        scale, shift, *_ = packed.unbind(-2)
        y = ada_norm(x, scale, shift)
        y.register_hook(lambda gradient: gradient.contiguous() + 0)
        return y

    x = rows()
    forward, backward = passes(wasteful, {"x": x, "packed": modulation()}, x, backend)
    assert_moves(forward, 2)
    assert_moves(backward, 5)


def test_operators():
    def call(x):
        x = x.detach()
        y = F.silu(x.view(N, -1))  # read, written
        y.add_(x.view(N, -1))  # two read, one written
        y.zero_()  # written
        y = torch.zeros_like(y.new_empty(y.shape))  # written
        return y, x.mean(1)[:, None].expand_as(x).neg()  # mean reads; neg writes, and reads a broadcast, which is small

    x = rows()
    forward, backward = passes(call, {"x": x}, x, "reference")
    assert_moves(forward, 2 + 3 + 1 + 1 + 2)
    assert backward == {}


def test_wider_elements_are_longer_passes():
    x = rows().bfloat16()
    forward, _ = passes(lambda x: x.detach().float(), {"x": x}, x, "reference")
    assert_moves(forward, 1 + 2)


@triton.jit
def _twice_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    total = tl.load(x_ptr + offsets) + tl.load(x_ptr + offsets, mask=offsets < SIZE // 2, other=0.0)
    tl.store(y_ptr + offsets, total)


def test_a_kernel_that_reads_twice():
    def call(x):
        y = torch.empty_like(x)
        _twice_kernel[(1,)](x.detach(), y, SIZE=512)
        return y

    x = torch.randn(512)
    forward, _ = passes(call, {"x": x}, x, "triton")
    assert forward == {"_twice_kernel: x_ptr read": 1.5, "_twice_kernel: y_ptr written": 1.0}
