"""align.objective=frames and irepa: every frame of a layer is pulled to the teacher's frame at its time."""

from collections.abc import Sequence

import torch
import torch.nn as nn

from ..kernels import frame_loss_sum
from .objective import AlignedLayer, Objective, linear, xavier


class Frames(Objective):
    """REPA (Yu et al. 2025, arXiv 2410.06940; loss.py and sit.py of sihyun-yu/REPA 67f7145): the mean over frames of
    1 - cos(head(h), teacher), the head three linear layers with SiLU, twice as wide as the layer (2048 in REPA). Its
    products are in the dtype of the hidden states, as under autocast.
    """

    tap = "frames"
    target = "frames"
    replayable = True
    context = 0  # frames on each side that the head sees

    def head(self, width: int, target_width: int) -> nn.Module:
        inner = 2 * width
        return nn.Sequential(
            linear(width, inner), nn.SiLU(), linear(inner, inner), nn.SiLU(), linear(inner, target_width)
        )

    def layers_of(self, head: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the weights and biases of a head, as frame_loss_sum takes them."""
        return [(part.weight, part.bias) for part in head if isinstance(part, nn.Linear)]

    def prepare(self, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the frames (N, T, E) that the head is to predict, from the teacher's."""
        return target

    def total(
        self, layers: Sequence[AlignedLayer], weights: torch.Tensor, t: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, losses = torch.zeros((), device=share.device), torch.zeros_like(share)
        for layer, weight in zip(layers, weights, strict=True):
            target = self.prepare(layer.target, layer.mask)
            parts = [(w.to(layer.tap.dtype), b.to(layer.tap.dtype)) for w, b in self.layers_of(layer.head)]
            of_layer, of_clips = frame_loss_sum(
                layer.tap, target, layer.mask.sum(1), weight * share, parts, self.context
            )
            total, losses = total + of_layer, losses + weight * of_clips
        return total, losses


class IRepa(Frames):
    """iREPA (arXiv 2512.10794, README of the code at 99ad4ac), with a convolution over time instead of the image: one
    of three frames as the head, and teacher frames whose channels have mean 0 and deviation 1 over the clip.
    """

    context = 1

    def head(self, width: int, target_width: int) -> nn.Module:
        return xavier(nn.Conv1d, width, target_width, 2 * self.context + 1, padding=self.context)

    def layers_of(self, head: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(head.weight.permute(0, 2, 1).flatten(1), head.bias)]

    def prepare(self, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counts = mask.sum(1).clamp(min=1).view(-1, 1, 1)
        target = torch.where(mask.unsqueeze(-1), target, 0)
        centred = target - target.sum(1, keepdim=True) / counts
        variance = torch.where(mask.unsqueeze(-1), centred.square(), 0).sum(1, keepdim=True) / counts
        return centred / (variance.sqrt() + 1e-6)
