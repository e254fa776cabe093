"""The clips that validation and probes use, the same at every step and on any number of ranks."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn as nn
from tqdm import tqdm

from ..attribution.points import probe_condition
from ..config import DOMAINS, Config
from ..data.batch import Batch, collate
from ..data.index import Index
from ..data.layout import ceil_div
from ..data.reading import fixed_clips
from ..data.samples import Sample
from ..errors import UserError


class Chunk(NamedTuple):
    """A batch of fixed clips, and the rows of it that this rank answers for. The other rows only fill it up."""

    batch: Batch
    owned: list[tuple[int, int]]  # (row, place among all fixed clips)


class FixedClips:
    """`per_domain` clips of every domain of a split that never change, in chunks of up to probe.chunk for this rank.

    Every rank has the same number of chunks, because ZeRO-3 gathers weights in each forward. one_shape: all chunks are
    padded alike, as CUDA graphs need. Raises UserError if there are fewer clips than ranks.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        per_domain: int,
        config: Config,
        device: torch.device | str,
        rank: int = 0,
        world: int = 1,
        *,
        one_shape: bool = False,
    ):
        self.index, self.config, self.device = index, config, torch.device(device)
        self.rank, self.world, self.one_shape = rank, world, one_shape
        self.samples: list[Sample] = [s for d in index.domains for s in fixed_clips(index, split, d, per_domain)]
        self.domain = torch.tensor([DOMAINS.index(sample.domain) for sample in self.samples])
        if len(self) < world:
            raise UserError(
                f"{len(self)} {split} clips are fewer than the {world} ranks that share them: raise probe.clips and "
                "eval.clips"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def chunks(self, label: str | None = None) -> Iterator[Chunk]:
        """Yield this rank's chunks, on the device. label: of a progress bar; None shows none."""
        return iter(tqdm(self._chunks, desc=label, unit="chunk", disable=label is None, leave=False))

    @cached_property
    def _chunks(self) -> list[Chunk]:
        return list(self._make_chunks())

    def _make_chunks(self) -> Iterator[Chunk]:
        share, size = ceil_div(len(self), self.world), self.config.probe.chunk
        rows, shape, padded = share, {}, None
        if self.one_shape:
            count = ceil_div(share, size)
            size = ceil_div(share, count)  # as even as possible: filled-up rows are computed for nothing
            rows = count * size
            shape["frames"] = max(sample.frames for sample in self.samples)
            shape["tokens"] = max(len(sample.tokens) for sample in self.samples)
            shape["text"] = max(0 if sample.text_ids is None else len(sample.text_ids) for sample in self.samples)
            padded = len({sample.frames for sample in self.samples}) > 1
        first, last = self.rank * share, min((self.rank + 1) * share, len(self)) - 1
        for start in range(first, first + rows, size):
            wanted = range(start, min(start + size, first + rows))
            owned = [(row, place) for row, place in enumerate(wanted) if place <= last]
            yield Chunk(self._batch([min(place, len(self) - 1) for place in wanted], shape, padded), owned)

    def _batch(self, places: list[int], shape: dict[str, int], padded: bool | None) -> Batch:
        samples = [self.samples[place] for place in places]
        batch = collate(samples, tuple(places), self.index, center=self.config.align.center, **shape).to(self.device)
        condition = probe_condition(batch.mel, batch.condition, self.config.flow)
        if padded is not None:
            condition = replace(condition, padded=padded)
        return replace(batch, condition=condition)


def probe_clips(
    index: Index, config: Config, device: torch.device | str, rank: int = 0, world: int = 1, *, one_shape: bool = False
) -> FixedClips:
    """Return the training clips for what layers contribute: probe.clips per domain."""
    return FixedClips(index, "train", config.probe.clips, config, device, rank, world, one_shape=one_shape)


def storage_clips(
    index: Index, config: Config, device: torch.device | str, rank: int = 0, world: int = 1
) -> FixedClips:
    """Return the training clips for what layers store: probe.storage_clips per domain, or as many as there are."""
    count = min(config.probe.storage_clips, *(index.clips("train", domain) for domain in index.domains))
    return FixedClips(index, "train", count, config, device, rank, world)


def validation_clips(
    index: Index, config: Config, device: torch.device | str, rank: int = 0, world: int = 1
) -> FixedClips:
    """Return the validation clips: eval.clips per domain."""
    return FixedClips(index, "val", config.eval.clips, config, device, rank, world)


def measure_chunks(
    model: nn.Module, clips: FixedClips, measure: Callable[[Chunk], None], label: str | None
) -> str | None:
    """Call `measure` with every chunk of this rank. Return the message of the first failure, or None.

    A rank that fails goes on with its next chunk, so that every rank runs the same number of forwards; then ranks must
    agree on the failure. Running out of memory is survived, except under ZeRO-3: there, a rank that stops inside a
    forward leaves the others waiting for its partitions.
    """
    partitioned = getattr(model, "partitioned", False)
    handled = (ValueError,) if partitioned else (ValueError, torch.OutOfMemoryError)
    failure = None
    for chunk in clips.chunks(label):
        try:
            measure(chunk)
        except handled as error:
            failure = failure or str(error)
    return failure
