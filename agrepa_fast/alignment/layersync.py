"""align.objective=layersync: a layer is pulled to a deeper one of the same forward, without teacher or head."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .objective import Objective, mean_over


class LayerSync(Objective):
    """LayerSync (arXiv 2510.12581; transport.py of vita-epfl/LayerSync): the mean over frames of 1 - cos(h, d), d the
    deeper layer's state without gradient.
    """

    tap = "frames"
    target = "deeper"
    replayable = True

    def loss(
        self, head: nn.Module | None, tap: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return mean_over(mask, 1 - F.cosine_similarity(tap.float(), target, dim=-1))
