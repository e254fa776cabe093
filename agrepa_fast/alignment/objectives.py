"""AG-REPA's loss: sum over the selected layers of lambda_k (1 - cos(head_k(pooled h_k), teacher)), each clip by its own
domain's teacher."""

import torch
import torch.nn.functional as F

from ..config import DOMAINS
from ..kernels import align_loss
from .heads import AlignmentHeads


def alignment_loss(
    heads: AlignmentHeads, hidden: dict[int, torch.Tensor], teacher: dict[str, torch.Tensor], domain: torch.Tensor
) -> torch.Tensor:
    """(N,) fp32, one value a clip.

    hidden: layer -> time-mean (N, D); teacher: domain -> (N, E), rows of clips of other domains are ignored; domain
    (N,) indexes DOMAINS. Hidden states are RMS-normalised, so that a head sees the same scale at every layer (the
    release L2-normalises). A domain without clips in the batch gives exact zeros and exactly zero gradients.
    """
    total = torch.zeros(domain.shape[0], device=domain.device)
    for name, layers in heads.selection.layers.items():
        pooled = torch.stack([hidden[layer].float() for layer in layers])
        pooled = F.rms_norm(pooled, pooled.shape[-1:], eps=1e-6)
        *weights, layer_weights = heads.stacked(name)
        mask = domain == DOMAINS.index(name)
        total = total + align_loss(pooled, *weights, teacher[name], layer_weights, mask)
    return total
