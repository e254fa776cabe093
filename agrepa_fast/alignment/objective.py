"""The interface of alignment objectives: heads for the aligned layers, and a loss per clip.

class Mine(Objective):  # align.objective=mine:Mine
    def head(self, width, target_width):
        return nn.Linear(width, target_width)

    def loss(self, head, tap, target, mask, t):
        return mean_over(mask, 1 - F.cosine_similarity(head(tap.float()), target, dim=-1))
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn

TAPS = ("frames", "pooled")
TARGETS = ("pooled", "frames", "deeper", "averaged", None)
OF_LAYERS = ("deeper", "averaged")  # targets that are states of the model


class Attention(NamedTuple):
    """The attention of an aligned layer, and that of its teacher. Scores of attention are products of queries and keys,
    those of the layer over the square root of E."""

    q: torch.Tensor  # (N, H, T, E), behind its norm and rotation
    k: torch.Tensor
    lengths: torch.Tensor  # (N,) valid frames of them
    teacher: torch.Tensor  # (N, S, 2, H', E') queries and keys of the teacher's frames
    counts: torch.Tensor  # (N,) frames of the teacher; 0 for clips of other domains


class AlignedLayer(NamedTuple):
    """The material of one aligned layer for an objective: all clips of a batch, of which those of one domain count."""

    head: nn.Module | None
    tap: torch.Tensor  # (N, T, width), or pooled (N, width)
    target: torch.Tensor | None  # pooled (N, E), or (N, T, E)
    mask: torch.Tensor  # (N, T) bool: frames of these clips, without padding; pooled (N,)
    attention: Attention | None = None  # of an objective that asks for it


class Objective:
    """An objective of alignment. A subclass writes `loss`, and `head` if its layers have one.

    tap: what it takes of an aligned layer: "frames", the states of its frames, or "pooled", their mean. target: what it
    compares them with, without gradient:
    "pooled": the teacher's vector of each clip;
    "frames": the teacher's frames, at the times of the layer's;
    "deeper": the states of the layer that is align.deeper layers deeper;
    "averaged": that layer's states by the averaged weights, at a cleaner flow time;
    None: nothing.
    attention: whether it also takes the attention of layer and teacher, which objectives of ours alone can.
    replayable: its loss is a function of weights and arguments alone, so that training replays CUDA graphs of it by
    default; a graph would repeat the choices that Python made at its capture.
    An instance is made without arguments.
    """

    tap = "frames"
    target: str | None = "pooled"
    attention = False
    replayable = False

    def head(self, width: int, target_width: int) -> nn.Module | None:
        """Return a new head of a layer of `width` channels. Its weights are fp32. They are drawn from PyTorch's random
        state, which the run has set for this head. Parameters with requires_grad=False stay as they are."""
        return None

    def loss(
        self,
        head: nn.Module | None,
        tap: torch.Tensor,
        target: torch.Tensor | None,
        mask: torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss (N,) of each clip at one layer, without its weight lambda.

        tap (N, T, width) in the model's dtype, or pooled (N, width) fp32; target (N, T, E), or pooled (N, E), fp32;
        mask (N, T) bool: frames that count, or pooled (N,): clips that do; t (N,) flow times. Tap and target are zero
        where mask is False. Clips without a frame that counts are left out of the sum afterwards.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss(head, tap, target, mask, t)")

    def total(
        self, layers: Sequence[AlignedLayer], weights: torch.Tensor, t: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum over clips and layers of share times lambda times loss, fp32, to differentiate, and each
        clip's loss (N,), detached. weights: lambda (K,), or (K, N) of each clip; share (N,): weights of the clips.

        Override it where a fused operation computes all of it at once.
        """
        losses = torch.zeros_like(share)
        for layer, weight in zip(layers, weights, strict=True):
            mask = layer.mask
            each = self.loss(layer.head, _counted(layer.tap, mask), _counted(layer.target, mask), mask, t)
            if not isinstance(each, torch.Tensor) or each.shape != share.shape:
                found = tuple(each.shape) if isinstance(each, torch.Tensor) else f"a {type(each).__name__}"
                raise ValueError(f"{type(self).__name__}.loss returned {found}, not ({len(share)},): one loss per clip")
            counts = mask if mask.ndim == 1 else mask.any(1)
            losses = losses + torch.where(counts, weight * each, 0)
        return (share * losses).sum(), losses.detach()


def _counted(values: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor | None:
    """Return values (N, T, D), or (N, D), with zeros for frames or clips that do not count."""
    if values is None:
        return None
    counts = mask if values.ndim == mask.ndim + 1 else mask.any(1)
    return torch.where(counts.unsqueeze(-1), values, 0)


def mean_over(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the mean (N,) of values (N, T) over the frames that count, 0 for a clip without any."""
    return torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp(min=1)


def xavier(kind: type[nn.Module], *sizes: int, **options) -> nn.Module:
    """Return a layer with Xavier-uniform weights and zero biases, as in the released AG-REPA and REPA code."""
    options["device"] = torch.get_default_device()
    layer = nn.utils.skip_init(kind, *sizes, **options)  # draws no numbers that would be replaced
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def linear(inputs: int, outputs: int) -> nn.Module:
    """Return a linear layer with Xavier-uniform weights and zero biases."""
    return xavier(nn.Linear, inputs, outputs)
