"""align.objective=haste: the teacher's frames as in REPA, and the teacher's attention."""

from collections.abc import Sequence

import torch

from ..kernels import valid_frames
from .frames import Frames
from .objective import AlignedLayer, Attention
from .stretch import mean_weights

_NEVER = torch.finfo(torch.float32).min  # a score whose weight is 0, without NaN where all scores of a row are


class Haste(Frames):
    """HASTE (arXiv 2505.16792; loss.py of NUS-HPC-AI-Lab/HASTE eb7b1f1): REPA's loss plus the cross-entropy of the
    layer's attention to the teacher's, a mean over heads and the teacher's frames. The release weighs both by 0.5,
    which is align.weight here; align.stop ends both.
    """

    attention = True

    def total(
        self, layers: Sequence[AlignedLayer], weights: torch.Tensor, t: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, losses = super().total(layers, weights, t, share)
        for layer, weight in zip(layers, weights, strict=True):
            each = weight * attention_loss(layer.attention)
            total, losses = total + (share * each).sum(), losses + each.detach()
        return total, losses


def attention_loss(given: Attention) -> torch.Tensor:
    """Return the cross-entropy (N,) fp32 of each clip, 0 for clips without frames of the teacher.

    Maps are compared at the teacher's frames. The layer's queries and keys are averaged over each of them, as
    preparation averaged the teacher's: their products are the mean scores between two frames, and no map of the layer's
    own frames is made. The first heads are paired, as in the release, as many as both have.
    """
    parts = given.teacher.shape[1]
    heads = min(given.q.shape[1], given.teacher.shape[3])
    weights = mean_weights(given.lengths, given.counts, given.q.shape[2], parts).unsqueeze(1)
    valid = valid_frames(given.lengths, given.q.shape[2])[:, None, :, None]
    counts = valid_frames(given.counts, parts)
    q, k = (weights @ torch.where(valid, x[:, :heads].float(), 0) for x in (given.q, given.k))
    with torch.no_grad():
        wanted = _scores(*given.teacher[:, :, :, :heads].float().permute(2, 0, 3, 1, 4), counts).softmax(-1)
    found = _scores(q * q.shape[-1] ** -0.5, k, counts).log_softmax(-1)
    each = torch.where(counts.unsqueeze(1), -(wanted * found).sum(-1), 0)
    return each.sum((1, 2)) / (heads * given.counts.clamp(min=1))


def _scores(q: torch.Tensor, k: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return q times k, (N, H, S, S), with no weight on keys that do not count. counts (N, S) bool."""
    return (q @ k.mT).masked_fill(~counts[:, None, None], _NEVER)
