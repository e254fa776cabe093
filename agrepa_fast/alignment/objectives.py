"""AG-REPA's loss: sum over the selected layers of lambda_k (1 - cos(head_k(pooled h_k), teacher)), each clip by its own
domain's teacher."""

import torch
import torch.nn.functional as F

from ..config import DOMAINS
from ..kernels import align_loss_sum
from .heads import AlignmentHeads


def alignment_loss(
    heads: AlignmentHeads, hidden: dict[int, torch.Tensor], teacher: dict[str, torch.Tensor], domain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over clips, fp32, which is what is differentiated, and each clip's loss (N,), detached.

    hidden: layer -> time-mean (N, D); teacher: domain -> (N, E), rows of clips of other domains are ignored; domain
    (N,) indexes DOMAINS. Hidden states are RMS-normalised, so that a head sees the same scale at every layer (the
    release L2-normalises). A domain without clips in the batch gives exact zeros and exactly zero gradients.
    """
    clips = domain.shape[0]
    mean, losses = (torch.zeros(shape, device=domain.device) for shape in ((), (clips,)))
    share = torch.full((clips,), 1 / clips, device=domain.device)
    for name, layers in heads.selection.layers.items():
        pooled = torch.stack([hidden[layer].float() for layer in layers])
        pooled = F.rms_norm(pooled, pooled.shape[-1:], eps=1e-6)
        *weights, layer_weights = heads.stacked(name)
        mask = domain == DOMAINS.index(name)
        part, of_clips = align_loss_sum(pooled, *weights, teacher[name], layer_weights, mask, share)
        mean, losses = mean + part, losses + of_clips
    return mean, losses
