import pytest
import torch

from agrepa_fast.kernels import ada_norm, gated_residual


def inputs(n=6, c=3, t=5, d=8):
    return torch.randn(n, t, d), torch.randn(n, t, d), torch.randn(c, d)


def test_adds_the_gated_branch_of_the_rows_condition():
    h, f, gate = inputs()
    m = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.0, 0.75])
    out = gated_residual(h, f, gate, m).h
    for row in range(6):
        torch.testing.assert_close(out[row], h[row] + m[row] * gate[row % 3] * f[row])


def test_gate_zero_hands_on_the_input_bit_for_bit_even_when_the_branch_is_not_finite():
    h, f, gate = inputs()
    f[1] = float("nan")
    f[4] = float("inf")
    m = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    out = gated_residual(h, f, gate, m).h
    assert torch.equal(out[[1, 4]], h[[1, 4]])
    assert out[[0, 2, 3, 5]].isfinite().all()


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
    with pytest.raises(ValueError, match="one gate a row"):
        gated_residual(h, f, gate, torch.ones(3))
    with pytest.raises(ValueError, match="come together"):
        gated_residual(h, f, gate, scale=torch.randn(3, 8))
