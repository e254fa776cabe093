"""Which clips make up the global batch of an optimizer step: a function of (seed, step) alone.

Neither ranks, nor accumulated micro-batches, nor loader processes change it. It is found without the steps before, so a
run resumes anywhere, on any number of ranks, by opening the shards of one batch. The promises:

* Within a domain and length bucket no clip comes twice before every clip came once.
* A global batch has clips of one bucket, and the same number of them at each turn of that bucket: as many as the budget
  allows.
* Over a cycle of steps all buckets of a domain keep in step, and the domains' clips are mixed by data.speech_share, in
  every bucket by the clips that each domain has there.
* The plan has no end: every rank has the same number of batches, however many clips its shards hold.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from .buckets import Bucket, length_buckets
from .index import Index
from .layout import BatchLayout, ceil_div
from .order import ClipOrder, seeded

if TYPE_CHECKING:  # loader processes do without pydantic
    from ..config import Config

_CROWDED = 8  # reads of a shard in an epoch that are worth a warning


class Pick(NamedTuple):
    """One clip of a global batch: its domain, and its position in the order of that domain's clips in the bucket."""

    domain: str
    position: int


class BatchPlan:
    """The global batches of a run.

    Either `clips` is the size of every batch, or `budget` bounds its cost (train.batch_frames): a clip of F frames
    costs F + attention_cost * F^2 frames. fixed_shapes: batches are padded to their bucket's length;
    always so if there are several buckets or a budget, or if all clips are as long as their bucket. Raises UserError if
    a batch would have fewer than `least` clips.
    """

    def __init__(
        self,
        index: Index,
        speech_share: float,
        seed: int,
        *,
        clips: int | None = None,
        budget: float | None = None,
        attention_cost: float = 0.0,
        least: int = 1,
        fixed_shapes: bool = False,
    ):
        self.seed, self.attention_cost = seed, attention_cost
        self.buckets = length_buckets(
            index, speech_share, lambda frames: clips or int(budget / self.cost(frames)), least
        )
        shards = [shard for bucket in self.buckets for of_domain in bucket.shards.values() for shard in of_domain]
        as_long = all(shard.frames == shard.clips * shard.bucket for shard in shards)
        self.fixed_shapes = fixed_shapes or budget is not None or len(self.buckets) > 1 or as_long
        self.orders = {
            (number, domain): ClipOrder(
                [shard.clips for shard in shards], _most_clips(bucket, domain), seed, f"{domain} {bucket.frames}"
            )
            for number, bucket in enumerate(self.buckets)
            for domain, shards in bucket.shards.items()
        }
        self.cycle = sum(bucket.steps for bucket in self.buckets)

    @classmethod
    def of(cls, index: Index, config: "Config", layout: BatchLayout, attention_cost: float, seed: int) -> Self:
        """Return the plan of a run. attention_cost: of its model, Backbone.attention_cost. seed: of its draws."""
        train = config.train
        size = {"clips": train.batch_clips} if train.batch_frames is None else {"budget": train.batch_frames}
        options = {**size, "attention_cost": attention_cost, "least": layout.parts, "fixed_shapes": bool(train.graphs)}
        return cls(index, config.data.speech_share, seed, **options)

    def cost(self, frames: int) -> float:
        """Return the cost of a clip, in frames: its linear layers cost one per frame, attention a share per pair."""
        return frames + self.attention_cost * frames**2

    @property
    def worst(self) -> int:
        """The number of the bucket whose batch costs most."""
        costs = [bucket.clips * self.cost(bucket.frames) for bucket in self.buckets]
        return max(range(len(costs)), key=lambda number: (costs[number], self.buckets[number].frames))

    def bucket(self, step: int) -> tuple[int, int]:
        """Return the number of a step's bucket, and how many steps that bucket had before."""
        cycle, turn = divmod(step, self.cycle)
        turns = _turns(self.seed, tuple(bucket.steps for bucket in self.buckets), cycle)
        number = int(turns[turn])
        return number, cycle * self.buckets[number].steps + int(np.count_nonzero(turns[:turn] == number))

    def batch(self, step: int) -> tuple[int, list[Pick]]:
        """Return the number of a step's bucket and the clips of its global batch, place by place.

        The domains are spread evenly over the places. The clips of a domain are in the order of lanes, so that the
        places of a rank stay in the same lanes.
        """
        number, before = self.bucket(step)
        bucket = self.buckets[number]
        first, end = (_speech_before(bucket, turn) for turn in (before, before + 1))
        positions = {
            "speech": range(first, end),
            "audio": range(before * bucket.clips - first, (before + 1) * bucket.clips - end),
        }
        picks = {}
        for domain, of_domain in positions.items():
            if len(of_domain):
                lane = self.orders[number, domain].lane
                picks[domain] = iter(sorted(of_domain, key=lambda position: (lane(position), position)))
        domains = batch_domains(bucket.clips, end - first)
        return number, [Pick(domain, next(picks[domain])) for domain in domains]

    def describe(self) -> str:
        """Return a line about the batches of each bucket, and how often they come."""
        parts = [
            f"{b.clips} clips of up to {b.frames} frames ({b.steps / self.cycle:.0%} of steps)" for b in self.buckets
        ]
        return "global batches: " + ", ".join(parts)

    def crowding(self, layout: BatchLayout, workers: int) -> str | None:
        """Return a warning if shards are so few that ranks and loader processes read each of them several times an
        epoch."""
        processes, most, crowded = layout.world * max(1, workers), 0.0, None
        for (number, domain), order in self.orders.items():
            bucket, shards = self.buckets[number], len(order.counts)
            rank_lanes = min(order.lanes, ceil_div(bucket.clips, layout.world))
            opened = min(shards, shards * rank_lanes / order.lanes + rank_lanes)
            if (times := processes * opened / shards) > most:
                most, crowded = times, f"{shards} {domain} shards of up to {bucket.frames} frames"
        if most <= _CROWDED:
            return None
        return (
            f"{crowded}: each is read about {most:.0f} times an epoch by {layout.world} ranks x {max(1, workers)} "
            "loader processes: prepare with a lower data.shard_clips, or lower data.workers"
        )


def batch_domains(clips: int, speech: int) -> list[str]:
    """Return the domain of each place of a global batch, with its speech clips spread evenly."""
    return ["speech" if (place + 1) * speech // clips > place * speech // clips else "audio" for place in range(clips)]


def _speech_before(bucket: Bucket, turn: int) -> int:
    """Return the number of speech clips in the bucket's batches before its turn-th."""
    return int(turn * bucket.clips * bucket.speech)


def _most_clips(bucket: Bucket, domain: str) -> int:
    """Return the most clips of a domain that a batch of the bucket has."""
    return math.ceil(bucket.clips * (bucket.speech if domain == "speech" else 1 - bucket.speech))


@lru_cache(maxsize=8)
def _turns(seed: int, steps: tuple[int, ...], cycle: int) -> np.ndarray:
    """Return the bucket of each step of a cycle. steps: of each bucket in a cycle."""
    return seeded(seed, "buckets", cycle, "turns").permutation(np.repeat(np.arange(len(steps)), steps))
