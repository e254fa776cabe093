"""Teacher-projection cosine loss of all aligned layers of one domain: loss_n = sum_k lambda_k (1 - cos(mlp_k(h_kn),
y_n)).

AG-REPA (arXiv 2603.01006), sec. "AG-REPA"; frame-wise it is REPA's loss (Yu et al. 2025) with the same heads.

Dims:     K aligned layers, N rows, T frames, D width, H hidden width of the heads, E teacher width.
Shapes:   hidden (K, N, D) pooled or (K, N, T, D) frame-wise; w1 (K, H, D), b1 (K, H), w2 (K, E, H), b2 (K, E);
          teacher (N, E) or (N, T, E); weights (K,); mask (N,) bool; lengths (N,), frame-wise only; loss (N,) fp32.
Numerics: cosine in fp32; a row whose mask is False gives exactly 0 and no gradient, whatever its teacher holds.
"""

import torch
import torch.nn.functional as F

from ._rows import valid_frames


def _heads(
    hidden: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    flat = hidden.flatten(1, -2)
    inner = F.gelu(torch.baddbmm(b1.unsqueeze(1), flat, w1.transpose(1, 2)))
    return torch.baddbmm(b2.unsqueeze(1), inner, w2.transpose(1, 2)).unflatten(1, hidden.shape[1:-1])


def align_loss_ref(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    # Not only the loss: 0 times a teacher that is not finite would reach the gradients.
    teacher = torch.where(mask.view(-1, *[1] * (teacher.ndim - 1)), teacher, 0)
    distance = 1 - F.cosine_similarity(_heads(hidden, w1, b1, w2, b2), teacher.unsqueeze(0), dim=-1)
    if distance.ndim == 3:
        if lengths is None:
            distance = distance.mean(-1)
        else:
            distance = torch.where(valid_frames(lengths, distance.shape[-1]), distance, 0).sum(-1) / lengths
    return torch.where(mask, (weights.unsqueeze(1) * distance).sum(0), 0)


def align_loss(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-row loss (N,), fp32. Raises ValueError when the hidden states and the teacher do not have the same rows and
    frames."""
    if hidden.shape[1:-1] != teacher.shape[:-1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and teacher {tuple(teacher.shape)} must share rows and frames")
    return align_loss_ref(hidden.float(), w1, b1, w2, b2, teacher.float(), weights, mask, lengths)
