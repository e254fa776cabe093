"""Batches of clips: tensors that are views into one buffer, which moves between processes and devices as a whole."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import torch

from ..domains import DOMAINS
from ..models.condition import Condition
from .index import Index
from .reading import Fault
from .samples import Sample

_ALIGNMENT = 64  # bytes: a cache line, and more than the widest load of a GPU


class TeacherFrames(NamedTuple):
    """The teacher's frames of clips. Those of a clip span it evenly."""

    values: torch.Tensor  # (B, S, E) fp16, zero beyond each clip's
    counts: torch.Tensor  # (B,) int64; 0 for clips of other domains


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
    mean_frames: float = math.nan  # of the clips of its bucket, as its batches mix them
    faults: tuple[Fault, ...] = ()  # of clips that could not be used and that others replace
    teacher_frames: dict[str, TeacherFrames] = field(default_factory=dict)  # domain -> frames, if they were asked for
    attention: dict[str, torch.Tensor] = field(default_factory=dict)  # domain -> (B, S, *TeacherInfo.attention) fp16
    averaged: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> states by averaged weights; of a step

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on a device. Each buffer is copied once, and a batch of `collate` has one. The copy from
        pinned memory is asynchronous."""
        copies: dict[int, torch.Tensor] = {}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if (key := storage.data_ptr()) not in copies:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                copies[key] = whole.to(device, non_blocking=not tensor.is_cuda)  # the host would read too early
            return copies[key].view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        return self.map(moved)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Return the batch with `function` applied to every tensor."""
        return replace(
            self,
            domain=function(self.domain),
            mel=function(self.mel),
            condition=self.condition.map(function),
            teacher={name: function(vectors) for name, vectors in self.teacher.items()},
            teacher_frames={name: TeacherFrames(*map(function, both)) for name, both in self.teacher_frames.items()},
            attention={name: function(values) for name, values in self.attention.items()},
            averaged={layer: function(states) for layer, states in self.averaged.items()},
        )


class Field(NamedTuple):
    """A tensor in the buffer of a PackedBatch."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedBatch:
    """A batch as it travels between processes: one tensor of bytes, and the fields in it."""

    buffer: torch.Tensor  # uint8
    fields: dict[str, Field]
    keys: tuple[str, ...]
    places: tuple[int, ...]
    weight: float = 1.0
    mean_frames: float = math.nan
    faults: tuple[Fault, ...] = ()

    @classmethod
    def zeros(
        cls, sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]], keys: tuple[str, ...], places: tuple[int, ...]
    ) -> Self:
        """Return a batch of zeros. sizes: the type and shape of every field."""
        fields, end = {}, 0
        for name, (dtype, shape) in sizes.items():
            fields[name] = Field(dtype, shape, end)
            end += math.ceil(fields[name].bytes / _ALIGNMENT) * _ALIGNMENT
        return cls(torch.zeros(end, dtype=torch.uint8), fields, keys, places)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the view of a field."""
        place = self.fields[name]
        return self.buffer[place.offset : place.offset + place.bytes].view(place.dtype).view(place.shape)

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory. DataLoader's thread calls it if there is a GPU."""
        return replace(self, buffer=self.buffer.pin_memory())

    def unpack(self) -> Batch:
        """Return the batch whose tensors are views into the buffer."""
        mel = self.tensor("mel")
        condition = Condition(
            tokens=self.tensor("tokens"),
            token_lengths=self.tensor("token_lengths"),
            reference=self.tensor("zero").expand_as(mel),
            lengths=self.tensor("lengths"),
            extra_tokens=self.tensor("extra_tokens") if "extra_tokens" in self.fields else None,
            text=self.tensor("text") if "text" in self.fields else None,
            speaker=self.tensor("speaker") if "speaker" in self.fields else None,
        )
        teacher = {domain: self.tensor(domain) for domain in DOMAINS if domain in self.fields}
        frames = {
            domain: TeacherFrames(self.tensor(_frames(domain)), self.tensor(_counts(domain)))
            for domain in DOMAINS
            if _frames(domain) in self.fields
        }
        attention = {name: self.tensor(_attention(name)) for name in frames if _attention(name) in self.fields}
        given = self.places, self.weight, self.mean_frames, self.faults, frames, attention
        return Batch(self.keys, self.tensor("domain"), mel, condition, teacher, *given)


def _frames(domain: str) -> str:
    return f"{domain} frames"


def _counts(domain: str) -> str:
    return f"{domain} counts"


def _attention(domain: str) -> str:
    return f"{domain} attention"


def collate(
    samples: list[Sample],
    places: tuple[int, ...],
    index: Index,
    *,
    center: bool = True,
    frames: int = 0,
    tokens: int = 0,
    text: int = 0,
) -> Batch:
    """Return the batch of some clips, in one buffer; see pack."""
    return pack(samples, places, index, center=center, frames=frames, tokens=tokens, text=text).unpack()


def pack(
    samples: list[Sample],
    places: tuple[int, ...],
    index: Index,
    *,
    center: bool = True,
    frames: int = 0,
    tokens: int = 0,
    text: int = 0,
    teacher_frames: int | None = None,
    attention: bool = False,
) -> PackedBatch:
    """Pad samples to the longest (and at least `frames`, `tokens` and ids of `text`), normalise mels by the index's
    mean and standard deviation, and, with `center`, subtract their mean from teacher vectors.

    teacher_frames: add the teacher's frames, padded to at least so many; None: the batch has their means alone.
    attention: and their queries and keys.
    """
    clips = len(samples)
    frames = max(frames, *(s.frames for s in samples))
    tokens = max(tokens, *(len(s.tokens) for s in samples))
    sizes = {
        "mel": (torch.float32, (clips, frames, index.n_mels)),
        "zero": (torch.float32, (1, 1, 1)),
        "tokens": (torch.int64, (clips, tokens)),
        "token_lengths": (torch.int64, (clips,)),
        "lengths": (torch.int64, (clips,)),
        "domain": (torch.int64, (clips,)),
    }
    if index.extra_vocab is not None:
        sizes["extra_tokens"] = (torch.int64, (clips, tokens))
    if index.text is not None:
        sizes["text"] = (torch.int64, (clips, max(text, *(len(s.text_ids) for s in samples))))
    if index.speaker_dim is not None:
        sizes["speaker"] = (torch.float32, (clips, index.speaker_dim))
    sizes |= {domain: (torch.float32, (clips, index.teacher(domain).dim)) for domain in index.domains}
    if teacher_frames is not None:
        longest = max(teacher_frames, *(len(s.teacher) for s in samples))
        for domain in index.domains:
            sizes[_frames(domain)] = (torch.float16, (clips, longest, index.teacher(domain).dim))
            sizes[_counts(domain)] = (torch.int64, (clips,))
            if attention:
                sizes[_attention(domain)] = (torch.float16, (clips, longest, *index.teacher(domain).attention))
    packed = PackedBatch.zeros(sizes, tuple(s.key for s in samples), tuple(places))
    tensors = {name: packed.tensor(name) for name in sizes}
    for row, s in enumerate(samples):
        mel = tensors["mel"][row, : s.frames]
        mel.copy_(torch.from_numpy(s.mel)).sub_(index.mel_mean).div_(index.mel_std)
        tensors["tokens"][row, : len(s.tokens)] = torch.from_numpy(s.tokens)
        if "extra_tokens" in tensors:
            tensors["extra_tokens"][row, : len(s.tokens)] = torch.from_numpy(s.tokens2)
        if "text" in tensors:
            tensors["text"][row, : len(s.text_ids)] = torch.from_numpy(s.text_ids)
            tensors["text"][row, len(s.text_ids) :] = -1
        if "speaker" in tensors:
            tensors["speaker"][row] = torch.from_numpy(s.speaker)
        mean = index.teacher(s.domain).mean if center else 0
        tensors[s.domain][row] = torch.from_numpy(s.pooled - mean)
        if teacher_frames is not None:
            tensors[_frames(s.domain)][row, : len(s.teacher)] = torch.from_numpy(s.teacher.astype(np.float32) - mean)
            tensors[_counts(s.domain)][row] = len(s.teacher)
            if attention:
                tensors[_attention(s.domain)][row, : len(s.teacher)] = torch.from_numpy(s.attention)
    tensors["token_lengths"].copy_(torch.tensor([len(s.tokens) for s in samples]))
    tensors["lengths"].copy_(torch.tensor([s.frames for s in samples]))
    tensors["domain"].copy_(torch.tensor([DOMAINS.index(s.domain) for s in samples]))
    return packed
