"""The endless order in which the clips of some shards are taken: a function of the seed, found at any position."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..seeds import derive_seed

# A sequence of clips is read at so many places side by side, so that a rank, which has the same few places of each
# batch, reads only its part of the shards. More of them would hold more shards in memory. The order depends on it.
LANES = 32


class ClipAddress(NamedTuple):
    """The place of a clip in a ClipOrder."""

    lane: int
    epoch: int
    turn: int  # of its shard among the epoch's
    shard: int
    offset: int  # in the epoch's order of the shard's clips
    remaining: int  # clips of the shard that come after this one in its lane


class ClipOrder:
    """The clips of some shards, without end: in each epoch every clip once, with new orders of the shards and of the
    clips inside each.

    The epoch's clips, shard after shard, are divided into `lanes` runs of equal length. Position after position, the
    lanes take turns.
    """

    def __init__(self, counts: Sequence[int], lanes: int, seed: int, name: str):
        self.counts, self.seed, self.name = np.array(counts, np.int64), seed, name
        self.total = int(self.counts.sum())
        self.lanes = max(1, min(lanes, self.total, LANES))
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._clips = lru_cache(maxsize=4 * self.lanes)(self._make_clips)

    def __reduce__(self) -> tuple:
        return ClipOrder, (self.counts, self.lanes, self.seed, self.name)  # without the caches, which cannot be pickled

    def find(self, position: int) -> ClipAddress:
        """Return the address of the clip at a position."""
        epoch, step = divmod(position, self.total)
        row, lane = divmod(step, self.lanes)
        return self._address(epoch, lane, self._start(lane) + row)

    def lane(self, position: int) -> int:
        """Return the lane that a position belongs to."""
        return position % self.total % self.lanes

    def clip(self, address: ClipAddress) -> int:
        """Return the number that the address's clip has in its shard."""
        return int(self._clips(address.epoch, address.shard)[address.offset])

    def next_shard(self, address: ClipAddress) -> int:
        """Return the shard that the address's lane comes to next."""
        _, ends = self._epoch(address.epoch)
        if ends[address.turn] < self._start(address.lane + 1):
            return self._address(address.epoch, address.lane, int(ends[address.turn])).shard
        return self._address(address.epoch + 1, address.lane, self._start(address.lane)).shard

    def candidates(self, address: ClipAddress, shards: int) -> Iterator[Iterator[tuple[int, int]]]:
        """Return (shard, clip) of the address and of the clips that replace it if it cannot be read, shard by shard:
        first its own shard from the clip on, round to the clip before it; then the epoch's next shards, `shards` of
        them in all."""
        order, _ = self._epoch(address.epoch)
        for ahead in range(min(shards, len(order))):
            shard = int(order[(address.turn + ahead) % len(order)])
            clips = self._clips(address.epoch, shard)
            yield ((shard, int(clips[(address.offset + n) % len(clips)])) for n in range(len(clips)))

    def _start(self, lane: int) -> int:
        """Return where in the epoch's clips a lane begins."""
        return lane * (self.total // self.lanes) + min(lane, self.total % self.lanes)

    def _address(self, epoch: int, lane: int, clip: int) -> ClipAddress:
        """Return the address of a lane's clip, given as its number among all of the epoch's."""
        order, ends = self._epoch(epoch)
        turn = int(np.searchsorted(ends, clip, side="right"))
        shard, end = int(order[turn]), int(ends[turn])
        offset = clip - (end - int(self.counts[shard]))
        return ClipAddress(lane, epoch, turn, shard, offset, min(end, self._start(lane + 1)) - clip - 1)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's shards in order, and the number of clips up to the end of each."""
        order = seeded(self.seed, self.name, epoch, "shards").permutation(len(self.counts))
        return order, self.counts[order].cumsum()

    def _make_clips(self, epoch: int, shard: int) -> np.ndarray:
        return seeded(self.seed, self.name, epoch, f"clips of shard {shard}").permutation(self.counts[shard])


def seeded(seed: int, *names: object) -> np.random.Generator:
    """Return a generator for one purpose, named by `names`."""
    return np.random.default_rng(derive_seed(seed, *names) % 2**63)
