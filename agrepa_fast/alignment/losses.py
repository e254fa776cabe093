"""The alignment term of a batch: each clip by its own domain's layers, weights and targets."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch

from ..config import DOMAINS
from ..data.batch import TeacherFrames
from ..kernels import valid_frames
from ..models.backbone import valid_states
from ..models.condition import Condition
from .heads import AlignmentHeads
from .objective import OF_LAYERS, AlignedLayer, Attention, Objective
from .stretch import stretch


class Clips(Protocol):
    """The part of a Batch that alignment reads."""

    domain: torch.Tensor  # (N,) index into DOMAINS
    mel: torch.Tensor  # (N, T, n_mels)
    condition: Condition
    teacher: dict[str, torch.Tensor]  # domain -> (N, E), rows of clips of other domains are ignored
    teacher_frames: dict[str, TeacherFrames]  # domain -> frames (N, S, E), likewise, for target "frames"
    attention: dict[str, torch.Tensor]  # domain -> (N, S, stored layers, 2, H', E'), queries and keys of these frames
    averaged: dict[int, torch.Tensor]  # layer -> its states by averaged weights, for target "averaged"


def alignment_loss(
    objective: Objective,
    heads: AlignmentHeads,
    hidden: dict[int, torch.Tensor],
    clips: Clips,
    t: torch.Tensor,
    partner: Callable[[int], int] = lambda layer: layer,
    attention: Mapping[int, Sequence[torch.Tensor]] = MappingProxyType({}),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean over clips, fp32, to differentiate, and each clip's loss (N,), detached.

    hidden: layer -> its states (N, T', D), or their time-means (N, D), as objective.tap asks; t (N,) flow times.
    partner: the deeper layer that a layer is compared with. attention: layer -> its queries and keys (N, H, T', E), if
    the objective takes them. A domain without clips in the batch gives exact zeros and exactly zero gradients.
    """
    number = clips.domain.shape[0]
    mean, losses = (torch.zeros(shape, device=clips.domain.device) for shape in ((), (number,)))
    share = torch.full((number,), 1 / number, device=clips.domain.device)
    for name, layers in heads.selection.layers.items():
        of_domain = clips.domain == DOMAINS.index(name)
        targets = _Targets(objective, clips, name, hidden, partner)
        aligned = []
        for layer in layers:
            tap = hidden[layer]
            given = heads.of(name, layer), tap, targets.of(layer, tap), _mask(tap, of_domain, clips)
            pair = _attention(clips, name, attention[layer], layers, layer) if objective.attention else None
            aligned.append(AlignedLayer(*given, pair))
        part, of_clips = objective.total(aligned, heads.layer_weights(name, t), t, share)
        mean, losses = mean + part, losses + of_clips
    return mean, losses


def _mask(states: torch.Tensor, of_domain: torch.Tensor, clips: Clips) -> torch.Tensor:
    """Return (N, T') bool: valid frames of the domain's clips; for time-means (N,), the domain's clips."""
    if states.ndim == 2:
        return of_domain
    valid = valid_states(states, clips.condition.lengths, clips.mel.shape[1])
    return valid_frames(torch.where(of_domain, valid, 0), states.shape[1])


def _attention(
    clips: Clips, domain: str, queries_keys: Sequence[torch.Tensor], layers: Sequence[int], layer: int
) -> Attention:
    """Return a layer's queries and keys, and those of the teacher's layer that it is compared with.

    The deepest of the domain's aligned layers goes with the teacher's last, and both go up in step; one layer of the
    teacher goes with several if it has fewer, and its first ones go with none if it has more.
    """
    of_teacher = clips.attention[domain]
    stored, above = of_teacher.shape[2], sum(other > layer for other in layers)
    place = stored - 1 - above * stored // max(len(layers), stored)
    lengths = valid_states(queries_keys[0][:, 0], clips.condition.lengths, clips.mel.shape[1])
    return Attention(*queries_keys, lengths, of_teacher[:, :, place], clips.teacher_frames[domain].counts)


class _Targets:
    """The targets of a domain's layers. Teacher frames are stretched once for all layers of one time resolution."""

    def __init__(
        self,
        objective: Objective,
        clips: Clips,
        domain: str,
        hidden: dict[int, torch.Tensor],
        partner: Callable[[int], int],
    ):
        self.kind, self.clips, self.domain, self.hidden, self.partner = objective.target, clips, domain, hidden, partner
        self._stretched: dict[int, torch.Tensor] = {}

    def of(self, layer: int, tap: torch.Tensor) -> torch.Tensor | None:
        """Return the target of a layer with states `tap`, fp32."""
        if self.kind is None:
            return None
        if self.kind == "pooled":
            return self.clips.teacher[self.domain]
        lengths, frames = self.clips.condition.lengths, self.clips.mel.shape[1]
        valid, count = valid_states(tap, lengths, frames), tap.shape[1]
        if self.kind in OF_LAYERS:
            states = (self.hidden if self.kind == "deeper" else self.clips.averaged)[self.partner(layer)].detach()
            if states.shape[1] == count:
                return states.float()
            return stretch(states, valid_states(states, lengths, frames), valid, count)
        if count not in self._stretched:
            self._stretched[count] = stretch(*self.clips.teacher_frames[self.domain], valid, count)
        return self._stretched[count]
