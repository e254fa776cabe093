import pytest
import torch
import torch.nn as nn

from agrepa_fast.kernels import align_loss

K, N, T, D, H, E = 2, 5, 4, 6, 7, 3


def heads():
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, E)) for _ in range(K)]
    stacked = [torch.stack([getattr(m[i], name) for m in modules]) for i in (0, 2) for name in ("weight", "bias")]
    return modules, stacked


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_pooled_is_the_weighted_sum_of_each_heads_distance():
    modules, stacked = heads()
    hidden, teacher, weights = torch.randn(K, N, D), torch.randn(N, E), torch.tensor([0.7, 0.3])
    loss = align_loss(hidden, *stacked, teacher, weights, torch.ones(N, dtype=torch.bool))
    wanted = sum(w * (1 - cosine(m(h), teacher)) for w, m, h in zip(weights, modules, hidden, strict=True))
    torch.testing.assert_close(loss, wanted)


def test_frame_wise_averages_the_valid_frames_only():
    modules, stacked = heads()
    hidden, teacher, lengths = torch.randn(K, N, T, D), torch.randn(N, T, E), torch.tensor([4, 3, 2, 1, 4])
    loss = align_loss(hidden, *stacked, teacher, torch.ones(K), torch.ones(N, dtype=torch.bool), lengths)
    for row, length in enumerate(lengths):
        wanted = sum(
            (1 - cosine(m(h[row, :length]), teacher[row, :length])).mean() for m, h in zip(modules, hidden, strict=True)
        )
        torch.testing.assert_close(loss[row], wanted)


def test_masked_rows_give_exact_zeros_and_no_gradient_even_with_a_teacher_that_is_not_finite():
    _, stacked = heads()
    stacked = [s.detach().requires_grad_() for s in stacked]
    hidden = torch.randn(K, N, D, requires_grad=True)
    teacher = torch.randn(N, E)
    teacher[1], teacher[3] = float("nan"), float("inf")
    mask = torch.tensor([True, False, True, False, True])
    loss = align_loss(hidden, *stacked, teacher, torch.ones(K), mask)
    assert torch.equal(loss[~mask], torch.zeros(2))
    loss.sum().backward()
    assert torch.equal(hidden.grad[:, ~mask], torch.zeros(K, 2, D))
    assert (hidden.grad[:, mask] != 0).any(-1).all()
    for parameter in stacked:
        parameter.grad = None
    align_loss(hidden, *stacked, teacher, torch.ones(K), torch.zeros(N, dtype=torch.bool)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in stacked)


def test_a_zero_teacher_is_finite():
    _, stacked = heads()
    hidden = torch.randn(K, N, D, requires_grad=True)
    align_loss(hidden, *stacked, torch.zeros(N, E), torch.ones(K), torch.ones(N, dtype=torch.bool)).sum().backward()
    assert hidden.grad.isfinite().all()


def test_refuses_other_rows():
    _, stacked = heads()
    with pytest.raises(ValueError, match="share rows"):
        align_loss(
            torch.randn(K, N, D), *stacked, torch.randn(N + 1, E), torch.ones(K), torch.ones(N, dtype=torch.bool)
        )
