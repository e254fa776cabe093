"""align.objective=sra: a layer is pulled to a deeper one of the averaged weights, which see a cleaner input."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .objective import Objective, linear, mean_over


class Sra(Objective):
    """SRA (arXiv 2505.02831; SiT-SRA/loss.py, models/sit.py of vvvvvjdy/SRA): the mean over frames and channels of
    smooth-L1 with beta 0.05 between head(h) at t and the averaged weights' deeper layer at a time up to 0.2 nearer to
    the data, of the same noise and condition; the head two linear layers with SiLU.
    """

    tap = "frames"
    target = "averaged"
    replayable = True

    def head(self, width: int, target_width: int) -> nn.Module:
        inner = width + target_width
        return nn.Sequential(linear(width, inner), nn.SiLU(), linear(inner, target_width))

    def loss(
        self, head: nn.Module, tap: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(tap.device.type, dtype=tap.dtype, enabled=tap.dtype == torch.bfloat16):
            predicted = head(tap)
        each = F.smooth_l1_loss(predicted.float(), target, beta=0.05, reduction="none")
        return mean_over(mask, each.mean(-1))
