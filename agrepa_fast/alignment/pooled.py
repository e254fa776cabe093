"""align.objective=pooled, AG-REPA's: sum of lambda_k (1 - cos(head_k(time-mean of h_k), time-mean of the teacher))."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import align_loss_sum
from .objective import AlignedLayer, Objective, linear


class Pooled(Objective):
    """AG-REPA (arXiv 2603.01006): 2-layer heads of time-means.

    Hidden states are RMS-normalised, so that a head sees the same scale at every layer (the release L2-normalises).
    """

    tap = "pooled"
    target = "pooled"
    replayable = True

    def head(self, width: int, target_width: int) -> nn.Module:
        return nn.Sequential(linear(width, width), nn.GELU(), linear(width, target_width))

    def total(
        self, layers: Sequence[AlignedLayer], weights: torch.Tensor, t: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean, losses = torch.zeros((), device=share.device), torch.zeros_like(share)
        for places in _equally_wide(layers):
            chosen = [layers[place] for place in places]
            pooled = torch.stack([layer.tap.float() for layer in chosen])
            pooled = F.rms_norm(pooled, pooled.shape[-1:], eps=1e-6)
            # Not weights[places]: the list would be copied to the device, which a CUDA graph cannot do.
            of_layers = weights if len(places) == len(layers) else torch.stack([weights[place] for place in places])
            heads = _stacked([layer.head for layer in chosen])
            part, of_clips = align_loss_sum(pooled, *heads, chosen[0].target, of_layers, chosen[0].mask, share)
            mean, losses = mean + part, losses + of_clips
        return mean, losses


def _equally_wide(layers: Sequence[AlignedLayer]) -> list[list[int]]:
    """Return the places of the layers, in one list per width."""
    groups: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        groups.setdefault(layer.tap.shape[-1], []).append(place)
    return list(groups.values())


def _stacked(heads: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return w1 (K, D, D), b1 (K, D), w2 (K, E, D), b2 (K, E) of equally wide heads."""
    parts = zip(*((head[0].weight, head[0].bias, head[2].weight, head[2].bias) for head in heads), strict=True)
    return tuple(torch.stack(part) for part in parts)
