"""The endless order of the clips of some shards."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..seeds import derive_seed

# A sequence of clips is read at so many places side by side, so that a rank, which has the same few places of each
# batch, reads only its part of the shards. More of them would hold more shards in memory. The order depends on it.
LANES = 32


class Place(NamedTuple):
    """Where in a ClipOrder a clip is."""

    lane: int
    epoch: int
    nth: int  # of the epoch's shards
    shard: int
    offset: int  # in the epoch's order of the shard's clips
    left: int  # clips of the shard that come after this one in its lane


class ClipOrder:
    """The endless order of the clips of some shards: in each epoch every clip once, shards and the clips in them in an
    order of their own.

    The epoch's clips, shard after shard, are cut into `lanes` runs of equal length, and the positions take turns among
    them.
    """

    def __init__(self, counts: Sequence[int], lanes: int, seed: int, name: str):
        self.counts, self.seed, self.name = np.array(counts, np.int64), seed, name
        self.total = int(self.counts.sum())
        self.lanes = max(1, min(lanes, self.total, LANES))
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._clips = lru_cache(maxsize=4 * self.lanes)(self._make_clips)

    def find(self, position: int) -> Place:
        epoch, turn = divmod(position, self.total)
        row, lane = divmod(turn, self.lanes)
        return self._at(epoch, lane, self._start(lane) + row)

    def lane(self, position: int) -> int:
        return position % self.total % self.lanes

    def clip(self, place: Place) -> int:
        """The number of a place's clip in its shard."""
        return int(self._clips(place.epoch, place.shard)[place.offset])

    def after(self, place: Place) -> int:
        """The shard that the place's lane comes to next."""
        _, ends = self._epoch(place.epoch)
        if ends[place.nth] < self._start(place.lane + 1):
            return self._at(place.epoch, place.lane, int(ends[place.nth])).shard
        return self._at(place.epoch + 1, place.lane, self._start(place.lane)).shard

    def instead(self, place: Place, shards: int) -> Iterator[Iterator[tuple[int, int]]]:
        """What stands in for a clip that cannot be read, as (shard, clip): the clips that follow it in its shard, and
        round to itself; then those of the epoch's next shards, `shards` of them in all."""
        order, _ = self._epoch(place.epoch)
        for ahead in range(min(shards, len(order))):
            shard = int(order[(place.nth + ahead) % len(order)])
            clips = self._clips(place.epoch, shard)
            yield ((shard, int(clips[(place.offset + n) % len(clips)])) for n in range(len(clips)))

    def _start(self, lane: int) -> int:
        """Where in the epoch's clips a lane begins."""
        return lane * (self.total // self.lanes) + min(lane, self.total % self.lanes)

    def _at(self, epoch: int, lane: int, clip: int) -> Place:
        order, ends = self._epoch(epoch)
        nth = int(np.searchsorted(ends, clip, side="right"))
        shard, end = int(order[nth]), int(ends[nth])
        offset = clip - (end - int(self.counts[shard]))
        return Place(lane, epoch, nth, shard, offset, min(end, self._start(lane + 1)) - clip - 1)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = _random(self.seed, self.name, epoch, "shards").permutation(len(self.counts))
        return order, self.counts[order].cumsum()

    def _make_clips(self, epoch: int, shard: int) -> np.ndarray:
        return _random(self.seed, self.name, epoch, f"clips of shard {shard}").permutation(self.counts[shard])


def _random(seed: int, *names: object) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, *names) % 2**63)
