"""AG-REPA's loss terms beside the flow loss, each clip by its own domain's teacher.

Alignment of the selected layers: sum of lambda_k (1 - cos(head_k(pooled h_k), teacher)). BiT-C: 1 - cos(projection of
the pooled token condition, teacher).
"""

import torch
import torch.nn.functional as F

from ..config import DOMAINS
from ..kernels import align_loss_sum
from .heads import AlignmentHeads, BitcProjections


def alignment_loss(
    heads: AlignmentHeads,
    hidden: dict[int, torch.Tensor],
    teacher: dict[str, torch.Tensor],
    domain: torch.Tensor,
    t: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean over clips, fp32, to differentiate, and each clip's loss (N,), detached.

    hidden: layer -> time-mean (N, D); teacher: domain -> (N, E), rows of clips of other domains are ignored; domain
    (N,) indexes DOMAINS; t (N,) for weights that differ by time. Hidden states are RMS-normalised, so that a head sees
    the same scale at every layer (the release L2-normalises). A domain without clips in the batch gives exact zeros and
    exactly zero gradients.
    """
    clips = domain.shape[0]
    mean, losses = (torch.zeros(shape, device=domain.device) for shape in ((), (clips,)))
    share = torch.full((clips,), 1 / clips, device=domain.device)
    for name, layers in heads.selection.layers.items():
        mask = domain == DOMAINS.index(name)
        weights = heads.layer_weights(name, t)
        for places in heads.equally_wide(name):
            chosen = [layers[place] for place in places]
            pooled = torch.stack([hidden[layer].float() for layer in chosen])
            pooled = F.rms_norm(pooled, pooled.shape[-1:], eps=1e-6)
            of_layers = weights if len(places) == len(layers) else weights[places].contiguous()
            part, of_clips = align_loss_sum(pooled, *heads.stacked(name, chosen), teacher[name], of_layers, mask, share)
            mean, losses = mean + part, losses + of_clips
    return mean, losses


def bitc_loss(
    projections: BitcProjections,
    weights: dict[str, float],
    pooled: torch.Tensor,
    teacher: dict[str, torch.Tensor],
    domain: torch.Tensor,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """Return BiT-C (bi-stream teacher cosine), the mean over clips, fp32.

    pooled (N, D_tok): time-mean of the token condition; it is layer-normalised. weights: domain -> weight of its clips.
    kept (N,) bool: clips whose tokens were not dropped; the others add exact zeros.
    """
    normed = F.layer_norm(pooled.float(), pooled.shape[-1:])
    losses = torch.zeros(domain.shape[0], device=domain.device)
    for name, projection in projections.items():
        mask = domain == DOMAINS.index(name)
        mask = mask if kept is None else mask & kept
        distance = 1 - F.cosine_similarity(projection(normed), teacher[name].float(), dim=-1)
        losses = losses + torch.where(mask, weights[name] * distance, 0)
    return losses.mean()
