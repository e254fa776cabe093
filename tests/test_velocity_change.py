import pytest
import torch

from agrepa_fast.kernels import velocity_change


def test_is_the_relative_norm_over_valid_frames():
    base, variants, lengths = torch.randn(3, 6, 4), torch.randn(5, 3, 6, 4), torch.tensor([6, 3, 1])
    base[1, 3:] = float("nan")  # padding may hold anything
    variants[:, 2, 1:] = float("inf")
    change = velocity_change(variants, base, lengths)
    for k in range(5):
        for c, length in enumerate(lengths):
            a, b = variants[k, c, :length], base[c, :length]
            torch.testing.assert_close(change[k, c], (a - b).norm() / (b.norm() + 1e-8))


def test_is_fp32_and_zero_for_equal_velocities():
    v = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    change = velocity_change(v[None], v)
    assert change.dtype == torch.float32
    assert torch.equal(change, torch.zeros(1, 2))


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match="must be"):
        velocity_change(torch.randn(2, 3, 4, 5), torch.randn(3, 4, 6))
