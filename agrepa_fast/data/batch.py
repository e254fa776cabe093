"""A batch: clips as tensors."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..config import DOMAINS
from ..models.audio_dit.conditioning import Condition
from .index import Index
from .reading import Fault
from .samples import Sample


@dataclass(frozen=True)
class Batch:
    """B clips. `condition.reference` is empty (zeros): the training step draws it, probes fix it."""

    keys: tuple[str, ...]
    domain: torch.Tensor  # (B,) index into DOMAINS
    mel: torch.Tensor  # (B, T, n_mels) fp32, normalised, zero in the padding
    condition: Condition
    teacher: dict[str, torch.Tensor]  # domain -> (B, E) fp32, zero rows for clips of other domains
    places: tuple[int, ...]  # of each clip in the global batch
    weight: float = 1.0  # times its mean loss: then the mean over ranks and micro-batches is that over all clips
    faults: tuple[Fault, ...] = ()  # clips that it should have had; others stand in for them

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            domain=function(self.domain),
            mel=function(self.mel),
            condition=self.condition.map(function),
            teacher={name: function(vectors) for name, vectors in self.teacher.items()},
        )


def collate(
    samples: list[Sample],
    places: tuple[int, ...],
    index: Index,
    *,
    center: bool = True,
    frames: int = 0,
    tokens: int = 0,
) -> Batch:
    """Pad samples to the longest (and at least `frames` and `tokens`), normalise mels by the index's mean and std,
    centre teacher vectors by their mean."""
    frames = max(frames, *(s.mel.shape[0] for s in samples))
    tokens = max(tokens, *(len(s.tokens) for s in samples))
    mel = torch.zeros(len(samples), frames, index.n_mels)
    ids = torch.zeros(len(samples), tokens, dtype=torch.int64)
    extra = None if index.extra_vocab is None else torch.zeros_like(ids)
    teacher = {name: torch.zeros(len(samples), index.teacher(name).dim) for name in index.domains}
    for row, s in enumerate(samples):
        mel[row, : s.mel.shape[0]].copy_(torch.from_numpy(s.mel)).sub_(index.mel_mean).div_(index.mel_std)
        ids[row, : len(s.tokens)] = torch.from_numpy(s.tokens)
        if extra is not None:
            extra[row, : len(s.tokens)] = torch.from_numpy(s.tokens2)
        vector = s.pooled
        teacher[s.domain][row] = torch.from_numpy(vector - index.teacher(s.domain).mean if center else vector)
    condition = Condition(
        tokens=ids,
        token_lengths=torch.tensor([len(s.tokens) for s in samples]),
        reference=_empty_reference(mel),
        lengths=torch.tensor([s.mel.shape[0] for s in samples]),
        extra_tokens=extra,
    )
    domain = torch.tensor([DOMAINS.index(s.domain) for s in samples])
    return Batch(tuple(s.key for s in samples), domain, mel, condition, teacher, tuple(places))


def _packed(batch: Batch) -> Batch:
    """To be sent to another process: only the mels stay a tensor, for each tensor costs a file descriptor and a
    handshake, and the others are small. The reference is empty."""
    return replace(
        batch,
        domain=batch.domain.numpy(),
        condition=replace(batch.condition, reference=None).map(torch.Tensor.numpy),
        teacher={name: vectors.numpy() for name, vectors in batch.teacher.items()},
    )


def _unpacked(batch: Batch) -> Batch:
    arrays = {field.name: getattr(batch.condition, field.name) for field in fields(batch.condition)}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items() if isinstance(value, np.ndarray)}
    return replace(
        batch,
        domain=torch.from_numpy(batch.domain),
        condition=replace(batch.condition, reference=_empty_reference(batch.mel), **tensors),
        teacher={name: torch.from_numpy(vectors) for name, vectors in batch.teacher.items()},
    )


def _empty_reference(mel: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, 1, 1).expand_as(mel)
