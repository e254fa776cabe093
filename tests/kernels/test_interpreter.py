"""kernels/_interpreter.py: bf16 in Triton's interpreter behaves as torch.Tensor.to(torch.bfloat16) and as torch's
arithmetic do."""

import numpy as np
import pytest
import torch

from agrepa_fast.kernels._backend import tl, triton
from agrepa_fast.kernels._interpreter import narrow, widen

if torch.cuda.is_available():
    pytest.skip("kernels are not interpreted here", allow_module_level=True)

SIZE = 1024
ALL_BF16 = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def assert_narrows_as_torch(values: np.ndarray) -> None:
    """Bit for bit; NaN for NaN, whatever its payload."""
    ours, torchs = bf16(narrow(values)), torch.from_numpy(values).to(torch.bfloat16)
    nan = np.isnan(values)
    assert np.array_equal(ours.isnan().numpy(), nan)
    assert np.array_equal(bits_of(ours)[~nan], bits_of(torchs)[~nan])


def test_every_bf16_widens_exactly():
    assert np.array_equal(widen(ALL_BF16).view(np.uint32), bf16(ALL_BF16).float().numpy().view(np.uint32))


def test_every_bf16_narrows_to_itself():
    back = narrow(widen(ALL_BF16))
    nan = np.isnan(widen(ALL_BF16))
    assert np.array_equal(back[~nan], ALL_BF16[~nan])
    assert np.isnan(widen(back[nan])).all()


def test_random_bits_narrow_as_in_torch():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)  # every exponent, NaN among them
    assert_narrows_as_torch(bits.view(np.float32))


@pytest.mark.parametrize("low", [0x7FFF, 0x8000, 0x8001], ids=["below a tie", "tie", "above a tie"])
def test_around_every_tie(low):
    """Between any two neighbours: subnormals, the carry into the next exponent, and into infinity."""
    assert_narrows_as_torch(((ALL_BF16.astype(np.uint32) << 16) | low).view(np.float32))


def test_special_values():
    assert_narrows_as_torch(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-39, 3.4e38], np.float32))
    largest = np.array([0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF], np.uint32).view(np.float32)
    assert_narrows_as_torch(largest)
    assert list(np.isinf(widen(narrow(largest)))) == [False, False, True, True]


def test_nan_with_a_payload_in_the_low_bits_stays_nan():
    values = np.array([0x7F800001, 0xFF800001, 0x7F80FFFF], np.uint32).view(np.float32)  # truncated, they are infinite
    assert np.isnan(widen(narrow(values))).all()


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, absolute_ptr, less_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(sum_ptr + i, a + b)
    tl.store(product_ptr + i, a * b)
    tl.store(absolute_ptr + i, tl.abs(a))
    tl.store(less_ptr + i, tl.where(a < b, 1.0, 0.0))


def test_arithmetic_and_comparisons():
    torch.manual_seed(0)
    a, b = torch.randn(SIZE).bfloat16(), torch.randn(SIZE).bfloat16()
    b[:8] = a[:8]
    total, product, absolute = (torch.empty_like(a) for _ in range(3))
    less = torch.empty(SIZE)
    _arithmetic_kernel[(1,)](a, b, total, product, absolute, less, SIZE=SIZE)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(absolute, a.abs())
    assert torch.equal(less, (a < b).float())


@triton.jit
def _casts_kernel(a_ptr, x_ptr, wide_ptr, narrow_ptr, nearest_ptr, half_ptr, int_ptr, filled_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, x = tl.load(a_ptr + i), tl.load(x_ptr + i)
    tl.store(wide_ptr + i, a.to(tl.float32))
    tl.store(narrow_ptr + i, x.to(tl.bfloat16))
    tl.store(nearest_ptr + i, x.to(tl.bfloat16, fp_downcast_rounding="rtne"))
    tl.store(half_ptr + i, a.to(tl.float16))
    tl.store(int_ptr + i, tl.full((SIZE,), 3, tl.int32).to(tl.bfloat16))
    tl.store(filled_ptr + i, tl.full((SIZE,), 1.5, tl.bfloat16))


def test_casts():
    torch.manual_seed(0)
    a, x = torch.randn(SIZE).bfloat16(), torch.randn(SIZE)
    wide, half = torch.empty(SIZE), torch.empty(SIZE, dtype=torch.float16)
    narrowed, nearest, integers, filled = (torch.empty_like(a) for _ in range(4))
    _casts_kernel[(1,)](a, x, wide, narrowed, nearest, half, integers, filled, SIZE=SIZE)
    assert torch.equal(wide, a.float())
    assert torch.equal(narrowed, x.bfloat16())
    assert torch.equal(nearest, x.bfloat16())
    assert torch.equal(half, a.half())
    assert torch.equal(integers, torch.full_like(a, 3))
    assert torch.equal(filled, torch.full_like(a, 1.5))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    tl.store(c_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


def test_dot():
    torch.manual_seed(0)
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    c = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, c, SIZE=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@triton.jit
def _range_kernel(x_ptr, y_ptr, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for row in range(count):
        total += tl.load(x_ptr + row * SIZE + i).to(tl.float32)
    tl.store(y_ptr + i, total.to(tl.bfloat16))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_range_of_a_runtime_value(count):
    torch.manual_seed(0)
    x, y = torch.randn(5, SIZE).bfloat16(), torch.empty(SIZE, dtype=torch.bfloat16)
    _range_kernel[(1,)](x, y, count, SIZE=SIZE)
    total = torch.zeros(SIZE)
    for row in x[:count].float():
        total += row
    assert torch.equal(y, total.bfloat16())


@triton.jit
def _sum_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


def test_a_sum_of_bf16_raises():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=r"cast the tile to tl\.float32 first"):  # the interpreter wraps the TypeError
        _sum_kernel[(1,)](x, x.clone(), SIZE=16)


@triton.jit
def _maximum_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr, tl.max(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


def test_a_maximum_of_bf16():
    """Triton widens it itself."""
    x, y = torch.randn(16).bfloat16(), torch.empty(1)
    _maximum_kernel[(1,)](x, y, SIZE=16)
    assert y.item() == x.max().item()
