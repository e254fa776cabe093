"""Batches for training and probing from WebDataset shards, in an order that depends on the seed alone.

Each domain is an endless sequence: epoch after epoch its shards are permuted, and the clips inside each shard. Position
p of that sequence is found from the shards' counts without reading anything before it, so a run resumes in O(1) shards,
and every number of ranks sees the same global batches.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..config import DOMAINS, DataConfig, UserError
from ..flow import derive_seed
from ..models.conditioning import Condition
from .reading import read_shard
from .shards import Index, Sample


@dataclass(frozen=True)
class Batch:
    """B clips. `condition.reference` is empty (zeros): the training step draws it, probes fix it."""

    keys: tuple[str, ...]
    domain: torch.Tensor  # (B,) index into DOMAINS
    mel: torch.Tensor  # (B, T, n_mels) fp32, normalised, zero in the padding
    condition: Condition
    teacher: dict[str, torch.Tensor]  # domain -> (B, E) fp32, zero rows for clips of other domains
    places: tuple[int, ...]  # of each clip in the global batch

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.keys,
            self.domain.to(device),
            self.mel.to(device),
            self.condition.to(device),
            {name: vectors.to(device) for name, vectors in self.teacher.items()},
            self.places,
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
        mel[row, : s.mel.shape[0]] = (torch.from_numpy(s.mel).float() - index.mel_mean) / index.mel_std
        ids[row, : len(s.tokens)] = torch.from_numpy(s.tokens)
        if extra is not None:
            extra[row, : len(s.tokens)] = torch.from_numpy(s.tokens2)
        vector = s.pooled
        teacher[s.domain][row] = torch.from_numpy(vector - index.teacher(s.domain).mean if center else vector)
    condition = Condition(
        tokens=ids,
        token_lengths=torch.tensor([len(s.tokens) for s in samples]),
        reference=torch.zeros_like(mel),
        lengths=torch.tensor([s.mel.shape[0] for s in samples]),
        extra_tokens=extra,
    )
    domain = torch.tensor([DOMAINS.index(s.domain) for s in samples])
    return Batch(tuple(s.key for s in samples), domain, mel, condition, teacher, places)


def fixed_clips(index: Index, split: str, domain: str, count: int) -> list[Sample]:
    """The first `count` clips of a domain in shard order, the same in every run. UserError when there are fewer."""
    available = index.clips(split, domain)
    if available < count:
        raise UserError(
            f"{index.folder}: {count} {domain} clips of the {split} split are wanted, {available} are there: "
            "prepare more recordings, or lower probe.clips and eval.clips"
        )
    samples: list[Sample] = []
    for shard in index.shards(split, domain):
        if len(samples) >= count:
            break
        samples += read_shard(shard, index)
    return samples[:count]


class DomainSequence:
    """The endless sequence of one domain's training clips."""

    def __init__(self, index: Index, domain: str, seed: int):
        self.index, self.domain, self.seed = index, domain, seed
        self.shards = index.shards("train", domain)
        self.counts = np.array([shard.clips for shard in self.shards])
        self._read = lru_cache(maxsize=2)(lambda number: read_shard(self.shards[number], index))

    def __getitem__(self, position: int) -> Sample:
        epoch, offset = divmod(position, int(self.counts.sum()))
        order = self._permutation(len(self.shards), epoch, "shards")
        ends = self.counts[order].cumsum()
        nth = int(np.searchsorted(ends, offset, side="right"))
        number = int(order[nth])
        inside = offset - int(ends[nth] - self.counts[number])
        return self._read(number)[self._permutation(self.counts[number], epoch, f"clips of shard {number}")[inside]]

    def _permutation(self, count: int, epoch: int, what: str) -> np.ndarray:
        seed = derive_seed(self.seed, self.domain, epoch, what)
        return np.random.default_rng(seed % 2**63).permutation(count)


def batch_domains(domains: tuple[str, ...], clips: int, speech_share: float) -> list[str]:
    """The domain of each place of a global batch: speech spread evenly, `speech_share` of it when both domains
    exist."""
    if len(domains) == 1:
        return [domains[0]] * clips
    speech = round(clips * speech_share)
    return ["speech" if (p + 1) * speech // clips > p * speech // clips else "audio" for p in range(clips)]


class _RankBatches(IterableDataset):
    """This rank's micro-batches from a step on; loader worker w of W makes every W-th of them."""

    def __init__(self, index: Index, data: DataConfig, seed: int, center: bool, layout: "BatchLayout", step: int):
        self.index, self.seed, self.center, self.layout, self.step = index, seed, center, layout, step
        self.domains = batch_domains(index.domains, layout.batch_clips, data.speech_share)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        sequences = {domain: DomainSequence(self.index, domain, self.seed) for domain in set(self.domains)}
        number = first
        while True:
            ahead, micro = divmod(number, self.layout.accumulation)
            places = self.layout.places(micro)
            samples = [sequences[self.domains[p]][self._position(self.step + ahead, p)] for p in places]
            yield collate(samples, places, self.index, center=self.center)
            number += stride

    def _position(self, step: int, place: int) -> int:
        """Position of a place's clip in its domain's sequence."""
        domain = self.domains[place]
        return step * self.domains.count(domain) + self.domains[:place].count(domain)


@dataclass(frozen=True)
class BatchLayout:
    """How the clips of a global batch are spread over ranks and accumulated micro-batches."""

    batch_clips: int
    accumulation: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.batch_clips % (self.world * self.accumulation):
            raise UserError(
                f"train.batch_clips={self.batch_clips} cannot be split over {self.world} ranks x "
                f"train.accumulation={self.accumulation}: choose a multiple of {self.world * self.accumulation}"
            )

    @property
    def micro_batch(self) -> int:
        return self.batch_clips // (self.world * self.accumulation)

    def places(self, micro: int) -> tuple[int, ...]:
        start = (micro * self.world + self.rank) * self.micro_batch
        return tuple(range(start, start + self.micro_batch))


def train_batches(
    index: Index, data: DataConfig, layout: BatchLayout, *, seed: int, center: bool, step: int = 0
) -> Iterator[Batch]:
    """This rank's micro-batches in order, from optimizer step `step` on, without end."""
    batches = _RankBatches(index, data, seed, center, layout, step)
    # A generator of its own: DataLoader would draw from the one whose state a resumed run has restored for dropout.
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=data.workers,
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    return iter(loader)


def _ignore_signals(_worker: int) -> None:
    """A scheduler's signal goes to every process of a job; the ranks decide when their loader processes end."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
