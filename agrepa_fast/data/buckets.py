"""The length buckets of a run's training shards, and how often each of them gives a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..errors import UserError
from .index import Index, Shard

_LONGEST_CYCLE = 4096  # steps
_CLOSE = 0.01  # a bucket's share of the steps may be off by so much of itself


@dataclass(frozen=True)
class Bucket:
    """Clips of up to `frames` mel frames, `clips` of them in each global batch of the bucket."""

    frames: int
    clips: int
    speech: Fraction  # share of speech in the bucket's batches, on average
    shards: dict[str, tuple[Shard, ...]]  # by domain
    steps: int  # in a cycle

    @property
    def mean_frames(self) -> float:
        """Mean mel frames of a clip in the bucket's batches."""
        shares = {"speech": float(self.speech), "audio": float(1 - self.speech)}
        return sum(
            shares[domain] * sum(shard.frames for shard in part) / _clips(part) for domain, part in self.shards.items()
        )


def length_buckets(
    index: Index, speech_share: float, batch_clips: Callable[[int], int], least_clips: int
) -> list[Bucket]:
    """Return the length buckets of the training shards, shortest first.

    Domains are mixed by speech_share over all batches. Inside a bucket they are mixed by the clips that each domain has
    there, and a bucket comes as often as its share of each domain's clips demands, so that all buckets of a domain
    finish an epoch together. batch_clips(frames): clips per batch of a bucket. Raises UserError if that is below
    `least_clips`.
    """
    weights = {"speech": Fraction(speech_share).limit_denominator(10**6)}
    weights["audio"] = 1 - weights["speech"]
    if len(index.domains) == 1:
        weights = {index.domains[0]: Fraction(1)}
    shards = {domain: index.shards("train", domain) for domain, weight in weights.items() if weight}
    totals = {domain: _clips(of_domain) for domain, of_domain in shards.items()}
    ends = sorted({shard.bucket for of_domain in shards.values() for shard in of_domain})
    inside = [{d: tuple(s for s in shards[d] if s.bucket == frames) for d in shards} for frames in ends]
    clips = [batch_clips(frames) for frames in ends]
    for frames, count in zip(ends, clips, strict=True):
        if count < least_clips:
            raise UserError(
                f"train.batch_frames allows {count} clips of {frames} frames, fewer than ranks x train.accumulation = "
                f"{least_clips}: raise it, lower train.accumulation, or prepare with a lower data.max_seconds"
            )
    # Of all clips that are taken, the share that come from one bucket and domain.
    shares = [{d: weights[d] * _clips(part) / totals[d] for d, part in of_bucket.items()} for of_bucket in inside]
    steps = _cycle_counts([sum(share.values()) / count for share, count in zip(shares, clips, strict=True)])
    return [
        Bucket(
            frames=ends[i],
            clips=clips[i],
            speech=shares[i].get("speech", Fraction(0)) / sum(shares[i].values()),
            shards={domain: part for domain, part in inside[i].items() if part},
            steps=steps[i],
        )
        for i in range(len(ends))
    ]


def _clips(shards: tuple[Shard, ...]) -> int:
    return sum(shard.clips for shard in shards)


def _cycle_counts(frequencies: list[Fraction]) -> list[int]:
    """Return whole numbers in the proportion of `frequencies`, each at least 1: those of the smallest sum at which each
    is within 1 % of its share, or the closest up to the longest cycle."""
    total = sum(frequencies)
    shares = np.array([float(frequency / total) for frequency in frequencies])
    closest, error = np.ones(len(shares), np.int64), np.inf
    for cycle in range(len(shares), _LONGEST_CYCLE + 1):
        exact = shares * cycle
        counts = np.maximum(1, np.floor(exact)).astype(np.int64)
        while (missing := cycle - counts.sum()) > 0:
            counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        off = float(np.abs(counts / counts.sum() / shares - 1).max())
        if off < error:
            closest, error = counts, off
        if error <= _CLOSE:
            break
    return closest.tolist()
