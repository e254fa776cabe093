"""Clips' figures to rates, means and distances with their intervals, and to paired differences of two systems.

A clip is a row of clips.csv. Draws of a clip are joined first: its counts are summed, its scores averaged. A distance
of sets is that of each draw, averaged: means of embeddings would vary less than any model's samples. Clips without a
figure are no zeros: they are not counted, and n says so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .distances import frechet, frechet_infinity, median_distance, mmd
from .intervals import Interval, jackknife, mean_interval, paired_difference, rate_interval

RESAMPLES = 10_000  # of the paired bootstrap
GROUPS = 20  # of clips, in the jackknife
SEED = 0  # of both, and of FAD's subsets

Row = Mapping[str, object]  # a row of clips.csv; None where a metric does not apply
Pair = tuple[float, float]  # numerator and denominator


class ClipMetric(NamedTuple):
    """A metric that is a mean or a ratio of sums over clips. pair: of one row, or None where it has none."""

    unit: str
    pair: Callable[[Row], Pair | None]
    rate: bool = False  # a share: its interval is logit-t


def _counted(errors: str, units: str, capped: bool = False) -> Callable[[Row], Pair | None]:
    def pair(row: Row) -> Pair | None:
        if row[units] is None or row[units] == 0:
            return None
        if not capped:
            return float(row[errors]), float(row[units])
        understood = row["understood"] in (None, True)
        return float(min(row[errors], row[units]) if understood else row[units]), float(row[units])

    return pair


def _mean(name: str) -> Callable[[Row], Pair | None]:
    return lambda row: None if row.get(name) is None else (float(row[name]), 1.0)


def _per_clip(count: Callable[[float], float]) -> Callable[[Row], Pair | None]:
    """Return the pair of a figure of each clip's own error rate."""
    return lambda row: (count(row["errors"] / row["words"]), 1.0) if row["words"] else None


CLIP_METRICS = {
    "wer": ClipMetric("errors per word", _counted("errors", "words"), rate=True),
    "wer_capped": ClipMetric("errors per word, at most one", _counted("errors", "words", capped=True), rate=True),
    "wer_utterance": ClipMetric("mean of the clips' rates", _per_clip(float)),
    "over_half": ClipMetric("share of clips above 50 % WER", _per_clip(lambda rate: float(rate > 0.5)), rate=True),
    "cer": ClipMetric("errors per character", _counted("char_errors", "chars"), rate=True),
    "wer_truth": ClipMetric("errors per word heard in the truth", _counted("heard_errors", "heard_words"), rate=True),
    "wer_truth_capped": ClipMetric(
        "errors per word heard in the truth, at most one",
        _counted("heard_errors", "heard_words", capped=True),
        rate=True,
    ),
    "mos": ClipMetric("predicted mean opinion, 1 to 5", _mean("mos")),
    "dnsmos_sig": ClipMetric("predicted opinion of the speech itself, 1 to 5", _mean("dnsmos_sig")),
    "dnsmos_bak": ClipMetric("predicted opinion of the background, 1 to 5", _mean("dnsmos_bak")),
    "dnsmos_ovrl": ClipMetric("predicted opinion of both, 1 to 5", _mean("dnsmos_ovrl")),
    "similarity": ClipMetric("cosine with the clip's truth", _mean("similarity")),
    "similarity_prompt": ClipMetric("cosine with the clip's prompt", _mean("similarity_prompt")),
    "mel_l1": ClipMetric("mean |log-mel - truth| beyond the reference", _mean("mel_l1")),
}
SET_METRICS = {
    "mmd": "1000 x unbiased squared MMD",
    "fad": "Frechet distance of clip means",
    "fad_inf": "Frechet distance, for infinitely many clips",
}


def pairs_by_clip(metric: str, rows: Sequence[Row]) -> dict[str, Pair]:
    """Return key -> (numerator, denominator) of the clips that have the figure."""
    found: dict[str, list[Pair]] = {}
    for row in rows:
        if (pair := CLIP_METRICS[metric].pair(row)) is not None:
            found.setdefault(str(row["key"]), []).append(pair)
    joined = {key: np.sum(pairs, axis=0) / len(pairs) for key, pairs in sorted(found.items())}
    return {key: (float(pair[0]), float(pair[1])) for key, pair in joined.items()}


def clip_value(metric: str, rows: Sequence[Row]) -> float:
    """Return the metric over the clips that have the figure, at least one."""
    numerator, denominator = np.sum(list(pairs_by_clip(metric, rows).values()), axis=0)
    return float(numerator / denominator)


def clip_interval(metric: str, rows: Sequence[Row], confidence: float) -> Interval | None:
    """Return the metric over the clips of one row and domain; None if no clip has the figure."""
    pairs = np.array(list(pairs_by_clip(metric, rows).values()), float)
    if len(pairs) == 0:
        return None
    if CLIP_METRICS[metric].rate:
        return rate_interval(pairs[:, 0], pairs[:, 1], confidence)
    return mean_interval(pairs[:, 0], confidence)


def clip_difference(metric: str, first: Sequence[Row], second: Sequence[Row], confidence: float) -> Interval | None:
    """Return the metric of `first` minus that of `second` over the clips that both have; None if there are none."""
    one, other = pairs_by_clip(metric, first), pairs_by_clip(metric, second)
    shared = [key for key in one if key in other]
    if not shared:
        return None
    arrays = [np.array([pairs[key] for key in shared]).T for pairs in (one, other)]
    return paired_difference(tuple(arrays[0]), tuple(arrays[1]), confidence, RESAMPLES, SEED)


class SetDistances:
    """Distances of clip embeddings, (clips, dim) or (clips, draws, dim), from those of a reference, (clips, dim)."""

    def __init__(self, reference: np.ndarray):
        self.reference, self.bandwidth = reference, median_distance(reference)

    def value(self, metric: str, x: np.ndarray, places: np.ndarray | None = None) -> float:
        """Return the distance of x, the mean of those of its draws. places: of the clips that count, None for all."""
        draws = x.swapaxes(0, 1) if x.ndim == 3 else [x]
        return float(np.mean([self._of_draw(metric, draw, places) for draw in draws]))

    def _of_draw(self, metric: str, x: np.ndarray, places: np.ndarray | None) -> float:
        if metric == "fad_inf":
            return frechet_infinity(x, self.reference, SEED, places)
        x = x if places is None else x[places]
        return mmd(x, self.reference, self.bandwidth) if metric == "mmd" else frechet(x, self.reference)

    def interval(self, metric: str, x: np.ndarray, confidence: float) -> Interval:
        """Return the distance of x. Raises ValueError for fewer than two clips."""
        return jackknife(len(x), lambda places: self.value(metric, x, places), GROUPS, confidence, SEED)

    def difference(self, metric: str, x: np.ndarray, y: np.ndarray, confidence: float) -> Interval:
        """Return the distance of x minus that of y, whose rows are of the same clips: pairing more than halves the
        error."""

        def statistic(places: np.ndarray) -> float:
            return self.value(metric, x, places) - self.value(metric, y, places)

        return jackknife(len(x), statistic, GROUPS, confidence, SEED)
