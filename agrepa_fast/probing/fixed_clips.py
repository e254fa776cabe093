"""The clips that validation and probes use, the same at every step and on any number of ranks."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn as nn
from tqdm import tqdm

from ..attribution.points import probe_condition
from ..config import DOMAINS, Config
from ..data.batch import Batch, collate
from ..data.index import Index
from ..data.reading import fixed_clips
from ..data.samples import Sample
from ..errors import UserError


class FixedClips:
    """The first clips of every domain of a split, in chunks for this rank.

    static: all chunks have the same shape, for CUDA graphs. center: as collate. Raises UserError when there are fewer
    clips than ranks.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        per_domain: int,
        chunk: int,
        device,
        rank: int = 0,
        world: int = 1,
        *,
        static: bool = False,
        center: bool = True,
    ):
        self.index, self.chunk, self.rank, self.world = index, chunk, rank, world
        self.device = torch.device(device)
        self.static, self.center = static, center
        self.samples: list[Sample] = [s for d in index.domains for s in fixed_clips(index, split, d, per_domain)]
        self.domain = torch.tensor([DOMAINS.index(sample.domain) for sample in self.samples])
        self._made: dict[float, list[tuple[Batch, list[int]]]] = {}
        if len(self) < world:
            raise UserError(
                f"{len(self)} {split} clips are fewer than the {world} ranks that share them: raise probe.clips and "
                "eval.clips"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, max_reference: float) -> list[tuple[Batch, list[int]]]:
        """This rank's chunks, on the device, and which rows of each it answers for; rows beyond its share repeat a clip
        and are dropped."""
        if max_reference not in self._made:
            self._made[max_reference] = list(self._make(max_reference))
        return self._made[max_reference]

    def _make(self, max_reference: float) -> Iterator[tuple[Batch, list[int]]]:
        share, chunk = -(-len(self) // self.world), self.chunk
        rows = share
        if self.static:
            chunks = -(-share // chunk)
            chunk = -(-share // chunks)  # as even as they can be: what fills up a chunk is computed for nothing
            rows = chunks * chunk
        mine = [self.rank * share + i for i in range(rows)]
        last = min((self.rank + 1) * share, len(self)) - 1
        least = {}
        if self.static:
            least = {"frames": max(s.frames for s in self.samples), "tokens": max(len(s.tokens) for s in self.samples)}
        padded = len({sample.frames for sample in self.samples}) > 1
        for start in range(0, rows, chunk):
            places = mine[start : start + chunk]
            owned = [row for row, place in enumerate(places) if place <= last]
            places = [min(place, len(self) - 1) for place in places]
            samples = [self.samples[place] for place in places]
            batch = collate(samples, tuple(places), self.index, center=self.center, **least).to(self.device)
            condition = probe_condition(batch.mel, batch.condition, max_reference)
            yield replace(batch, condition=replace(condition, padded=padded) if self.static else condition), owned


def _with_bar(clips: FixedClips, config: Config, what: str, progress: bool) -> Iterator[tuple[Batch, list[int]]]:
    batches = clips.batches(config.flow.max_reference)
    return iter(tqdm(batches, desc=what, unit="chunk", disable=not progress, leave=False))


def storage_clips(index: Index, config: Config, device, rank: int = 0, world: int = 1) -> FixedClips:
    """The clips that say what layers store: probe.storage_clips per domain, or as many as there are."""
    count = min(config.probe.storage_clips, *(index.clips("train", domain) for domain in index.domains))
    return FixedClips(index, "train", count, config.probe.chunk, device, rank, world, center=config.align.center)


def survivable(model: nn.Module) -> tuple[type[Exception], ...]:
    """What a probe may fail of on one rank while the others go on. Not of memory under ZeRO-3: there, a rank that stops
    inside a forward leaves the others waiting for its partitions."""
    partitioned = getattr(model, "partitioned", False)
    return (ValueError,) if partitioned else (ValueError, torch.OutOfMemoryError)
