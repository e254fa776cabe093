"""The length buckets of a run's training shards."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..errors import UserError
from .index import Index, Shard

_CYCLE = 4096  # steps, at most, after which every bucket has come as often as it should


@dataclass(frozen=True)
class Bucket:
    """Clips of up to `frames` mel frames, `clips` of them in each global batch of the bucket."""

    frames: int
    clips: int
    speech: Fraction  # of the clips, on the average of the bucket's batches
    shards: dict[str, tuple[Shard, ...]]  # by domain
    steps: int  # in a cycle


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
