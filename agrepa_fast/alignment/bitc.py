"""BiT-C, bi-stream teacher cosine: one linear map per domain pulls the pooled token condition to the teacher."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..config import DOMAINS
from ..seeds import derive_seed


class BitcProjections(nn.ModuleDict):
    """One bias-free linear map per domain, from the pooled token condition (layer 0) to its teacher.

    The weights are orthogonal, as in the released AG-REPA code, and depend on the seed and the domain alone.
    """

    def __init__(self, dim: int, teacher_dims: dict[str, int], seed: int):
        super().__init__()
        for domain, teacher_dim in teacher_dims.items():
            self[domain] = nn.Linear(dim, teacher_dim, bias=False)
            generator = torch.Generator().manual_seed(derive_seed(seed, f"bitc {domain}"))
            nn.init.orthogonal_(self[domain].weight, generator=generator)


def bitc_loss(
    projections: BitcProjections,
    weights: dict[str, float],
    pooled: torch.Tensor,
    teacher: dict[str, torch.Tensor],
    domain: torch.Tensor,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """Return the mean over all N clips of weight (1 - cos(projection of the token condition, teacher)), 0-dim fp32.

    pooled (N, D_tok): time-mean of the token condition; it is layer-normalised. weights: domain -> weight of its clips.
    teacher: domain -> (N, E). domain (N,): of each clip, an index into DOMAINS.
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
