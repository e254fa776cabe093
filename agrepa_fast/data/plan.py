"""Which clips make up the global batch of an optimizer step: a function of (seed, step) alone.

Neither ranks, nor accumulated micro-batches, nor loader processes change it, and it is found without anything that came
before, so a run resumes anywhere, on any number of ranks, by opening the shards of one batch. What is promised:

* Within a domain and length bucket no clip comes twice before every clip came once.
* A global batch has clips of one bucket, and as many of them whenever that bucket's turn comes: what the budget allows.
* Over a cycle of steps each bucket comes as often as keeps all buckets of a domain in step, and the domains' clips are
  mixed by data.speech_share, in every bucket by what each domain has there.
* The plan has no end: every rank has the same number of batches, however many clips its shards hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np

from ..config import DOMAINS, Config
from ..errors import UserError
from ..seeds import derive_seed
from .index import Index, Shard

# A sequence of clips is read at so many places side by side, so that a rank, which has the same few places of each
# batch, reads only its part of the shards. More of them would hold more shards in memory. The order depends on it.
LANES = 32
_CROWDED = 8  # reads of a shard in an epoch that are worth a warning
_CYCLE = 4096  # steps, at most, after which every bucket has come as often as it should


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


@dataclass(frozen=True)
class BatchLayout:
    """How the clips of a global batch are spread over ranks and accumulated micro-batches, as evenly as they can be.

    batch_clips: of every global batch; None: train.batch_frames decides, bucket by bucket.
    """

    batch_clips: int | None
    accumulation: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.batch_clips is not None and self.batch_clips < self.parts:
            raise UserError(
                f"train.batch_clips={self.batch_clips} cannot be split over {self.world} ranks x "
                f"train.accumulation={self.accumulation}: at least {self.parts} are needed"
            )

    @property
    def parts(self) -> int:
        """Micro-batches of a global batch, over all ranks."""
        return self.world * self.accumulation

    @property
    def micro_batch(self) -> int:
        """What DeepSpeed is told: the clips of the largest micro-batch, or 1 where they differ from step to step."""
        return 1 if self.batch_clips is None else -(-self.batch_clips // self.parts)

    def places(self, micro: int, clips: int | None = None) -> range:
        """The places of this rank's micro-batch in a global batch of so many clips."""
        clips = self.batch_clips if clips is None else clips
        part = micro * self.world + self.rank
        return range(part * clips // self.parts, (part + 1) * clips // self.parts)

    def weight(self, micro: int, clips: int) -> float:
        """What the micro-batch's mean loss is multiplied by, so that the mean over ranks and micro-batches, which
        DeepSpeed takes, is that over the global batch's clips."""
        return len(self.places(micro, clips)) * self.parts / clips


@dataclass(frozen=True)
class Bucket:
    """Clips of up to `frames` mel frames, `clips` of them in each global batch of the bucket."""

    frames: int
    clips: int
    speech: Fraction  # of the clips, on the average of the bucket's batches
    shards: dict[str, tuple[Shard, ...]]  # by domain
    steps: int  # in a cycle


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


def _buckets(index: Index, speech_share: float, clips_of, least: int) -> list[Bucket]:
    """The length buckets of the training shards, shortest first. A domain's clips are mixed in by its weight, a bucket
    gets its share of each domain's clips: weight x clips of the domain there / of the domain, summed over domains."""
    weights = {"speech": Fraction(speech_share).limit_denominator(10**6)}
    weights["audio"] = 1 - weights["speech"]
    if len(index.domains) == 1:
        weights = {index.domains[0]: Fraction(1)}
    shards = {domain: index.shards("train", domain) for domain, weight in weights.items() if weight}
    found, steps = [], []
    for frames in sorted({shard.bucket for of_domain in shards.values() for shard in of_domain}):
        inside = {domain: tuple(s for s in every if s.bucket == frames) for domain, every in shards.items()}
        shares = {
            domain: weights[domain] * sum(s.clips for s in part) / sum(s.clips for s in shards[domain])
            for domain, part in inside.items()
        }
        if (clips := clips_of(frames)) < least:
            raise UserError(
                f"train.batch_frames allows {clips} clips of {frames} frames, fewer than ranks x train.accumulation = "
                f"{least}: raise it, lower train.accumulation, or prepare with a lower data.max_seconds"
            )
        share = sum(shares.values())
        inside = {domain: part for domain, part in inside.items() if part}
        found.append(Bucket(frames, clips, shares.get("speech", Fraction(0)) / share, inside, 0))
        steps.append(share / clips)
    counts = _cycle_counts(steps)
    return [Bucket(b.frames, b.clips, b.speech, b.shards, count) for b, count in zip(found, counts, strict=True)]


def _cycle_counts(frequencies: list[Fraction]) -> list[int]:
    """Whole numbers in the proportion of `frequencies`, each at least 1: those of the least sum at which none is off by
    more than 1 %, or the best up to _CYCLE."""
    best, error = None, None
    total = sum(frequencies)
    shares = np.array([float(frequency / total) for frequency in frequencies])
    for cycle in range(len(shares), _CYCLE + 1):
        exact = shares * cycle
        counts = np.maximum(1, np.floor(exact)).astype(np.int64)
        while (missing := cycle - counts.sum()) > 0:
            counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        off = float(np.abs(counts / counts.sum() / shares - 1).max())
        if error is None or off < error:
            best, error = counts, off
        if error <= 0.01:
            break
    return best.tolist()


def batch_domains(clips: int, speech: int) -> list[str]:
    """The domain of each place of a global batch, the speech clips spread evenly."""
    return [DOMAINS[(p + 1) * speech // clips == p * speech // clips] for p in range(clips)]


def _random(seed: int, *names: object) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, *names) % 2**63)
