"""Which clips make up the global batch of an optimizer step: a function of (seed, step) alone.

Neither ranks, nor accumulated micro-batches, nor loader processes change it, and it is found without anything that came
before, so a run resumes anywhere, on any number of ranks, by opening the shards of one batch. What is promised:

* Within a domain and length bucket no clip comes twice before every clip came once.
* A global batch has clips of one bucket, and as many of them whenever that bucket's turn comes: what the budget allows.
* Over a cycle of steps each bucket comes as often as keeps all buckets of a domain in step, and the domains' clips are
  mixed by data.speech_share, in every bucket by what each domain has there.
* The plan has no end: every rank has the same number of batches, however many clips its shards hold.
"""

from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np

from ..config import DOMAINS, Config
from .buckets import Bucket, _buckets
from .index import Index
from .layout import BatchLayout
from .order import ClipOrder, _random

_CROWDED = 8  # reads of a shard in an epoch that are worth a warning


class Pick(NamedTuple):
    """One clip of a global batch: its domain, and its position in the order of that domain's clips in the bucket."""

    domain: str
    position: int


class BatchPlan:
    """The global batches of a run.

    clips: of every batch; or budget: a batch holds as many clips of its bucket as cost at most so much, a clip of F
    frames frames(F) + attention_cost * F^2 (train.batch_frames). fixed_shapes: batches are padded to their bucket,
    whatever is in them, as they are wherever there are buckets or a budget. Raises UserError where a batch would have
    fewer than `least` clips.
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
        self.buckets = _buckets(index, speech_share, lambda frames: clips or int(budget / self.cost(frames)), least)
        self.fixed_shapes = fixed_shapes or budget is not None or len(self.buckets) > 1
        self.orders = {
            (number, domain): ClipOrder(
                [shard.clips for shard in shards], self._most(bucket, domain), seed, f"{domain} {bucket.frames}"
            )
            for number, bucket in enumerate(self.buckets)
            for domain, shards in bucket.shards.items()
        }
        self.cycle = sum(bucket.steps for bucket in self.buckets)
        self._turns = lru_cache(maxsize=2)(self._make_turns)

    @classmethod
    def of(cls, index: Index, config: Config, layout: BatchLayout) -> Self:
        """Return the plan of a run. The cost of attention is its FLOPs per pair of frames over those of the linear
        layers per frame: 4 D, for scores and values, over (8 + 4 ffn_mult) D^2, for the four projections and the two
        FFN layers, = 1 / ((2 + ffn_mult) D)."""
        train, model = config.train, config.model
        cost = 1 / ((2 + model.ffn_mult) * model.dim)
        size = {"clips": train.batch_clips} if train.batch_frames is None else {"budget": train.batch_frames}
        options = {**size, "attention_cost": cost, "least": layout.parts, "fixed_shapes": train.graphs > 0}
        return cls(index, config.data.speech_share, config.run.seed, **options)

    def cost(self, frames: int) -> float:
        """Of a clip, in frames: linear layers take their share of each frame, attention one of each pair."""
        return frames + self.attention_cost * frames**2

    @property
    def worst(self) -> int:
        """The bucket whose batch costs most."""
        costs = [bucket.clips * self.cost(bucket.frames) for bucket in self.buckets]
        return max(range(len(costs)), key=lambda number: (costs[number], self.buckets[number].frames))

    def bucket(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps it had before."""
        cycle, turn = divmod(step, self.cycle)
        turns = self._turns(cycle)
        number = int(turns[turn])
        return number, cycle * self.buckets[number].steps + int(np.count_nonzero(turns[:turn] == number))

    def batch(self, step: int) -> tuple[int, list[Pick]]:
        """The bucket of a step and the clips of its global batch, place by place. The domains are spread evenly over
        the places, and places of a domain are in the order of lanes: those of a rank stay in the same lanes."""
        number, before = self.bucket(step)
        bucket = self.buckets[number]
        first, end = (self._speech_before(bucket, turn) for turn in (before, before + 1))
        speech = end - first
        positions = {
            "speech": range(first, end),
            "audio": range(before * bucket.clips - first, (before + 1) * bucket.clips - end),
        }
        picks = {}
        for domain, of_domain in positions.items():
            if len(of_domain):
                lane = self.orders[number, domain].lane
                picks[domain] = iter(sorted(of_domain, key=lambda position: (lane(position), position)))
        domains = batch_domains(bucket.clips, speech)
        return number, [Pick(domain, next(picks[domain])) for domain in domains]

    def describe(self) -> str:
        """One line: what each bucket's batches are, and how often they come."""
        parts = [
            f"{b.clips} clips of up to {b.frames} frames ({b.steps / self.cycle:.0%} of steps)" for b in self.buckets
        ]
        return "global batches: " + ", ".join(parts)

    def crowding(self, layout: BatchLayout, workers: int) -> str | None:
        """One line when shards are so few that ranks and loader processes read each of them several times an epoch."""
        processes, most, where = layout.world * max(1, workers), 0.0, None
        for (number, domain), order in self.orders.items():
            bucket, shards = self.buckets[number], len(order.counts)
            lanes = min(order.lanes, -(-bucket.clips // layout.world))  # of a rank
            opened = min(shards, shards * lanes / order.lanes + lanes)
            if (times := processes * opened / shards) > most:
                most, where = times, f"{shards} {domain} shards of up to {bucket.frames} frames"
        if most <= _CROWDED:
            return None
        return (
            f"{where}: each is read about {most:.0f} times an epoch by {layout.world} ranks x {max(1, workers)} loader "
            "processes: prepare with a lower data.shard_clips, or lower data.workers"
        )

    @staticmethod
    def _speech_before(bucket: Bucket, turn: int) -> int:
        """Speech clips of the bucket's batches before its turn-th."""
        return int(turn * bucket.clips * bucket.speech)

    @staticmethod
    def _most(bucket: Bucket, domain: str) -> int:
        """The most clips of a domain that a batch of the bucket has."""
        share = bucket.speech if domain == "speech" else 1 - bucket.speech
        return -int(-bucket.clips * share // 1)

    def _make_turns(self, cycle: int) -> np.ndarray:
        turns = np.repeat(np.arange(len(self.buckets)), [bucket.steps for bucket in self.buckets])
        return _random(self.seed, "buckets", cycle, "turns").permutation(turns)


def batch_domains(clips: int, speech: int) -> list[str]:
    """The domain of each place of a global batch, the speech clips spread evenly."""
    return [DOMAINS[(p + 1) * speech // clips == p * speech // clips] for p in range(clips)]
