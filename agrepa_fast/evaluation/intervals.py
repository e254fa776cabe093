"""Intervals and tests. Clips are the unit: draws of a clip are joined, or left out together.

Means have a t interval and rates a logit-t interval, differences of two systems on the same clips a paired bootstrap,
and distances between sets a delete-a-group jackknife, since a bootstrap of a Fréchet distance is biased: resampled sets
repeat clips. Over seeds there are a paired t interval and exact sign flips, corrected by Holm.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import stats

_CHUNK = 500  # resamples drawn at once
_FLIPPED = 16  # seeds whose sign patterns are all counted


class Interval(NamedTuple):
    """A value with its confidence interval. n: clips, or seeds. low and high are NaN if n does not allow any."""

    value: float
    low: float
    high: float
    n: int
    method: str


def mean_interval(values: np.ndarray, confidence: float) -> Interval:
    """Return the mean of values (n,) with its t interval. Raises ValueError for no value."""
    values = np.asarray(values, float)
    if len(values) == 0:
        raise ValueError("no values: there is no mean")
    mean, half = float(values.mean()), np.nan
    if len(values) > 1:
        half = _t(confidence, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values), "t")


def rate_interval(errors: np.ndarray, counts: np.ndarray, confidence: float) -> Interval:
    """Return sum(errors) / sum(counts) over clips, (n,) each, with a t interval of the linearised ratio on the logit
    scale, or on the log scale if some clip has more errors than counts, as word error rates may.

    A rate of 0 or 1 has no slope there. Its other end is where n clips without (or with all) errors have the
    probability (1 - confidence) / 2: 1 - that^(1 / n), and the like. Raises ValueError if nothing was counted.
    """
    errors, counts = np.asarray(errors, float), np.asarray(counts, float)
    if counts.sum() <= 0:
        raise ValueError("nothing was counted: there is no rate")
    n, rate = int((counts > 0).sum()), float(errors.sum() / counts.sum())
    tail = (1 - confidence) / 2
    if rate == 0:
        return Interval(0.0, 0.0, float(1 - tail ** (1 / n)), n, "logit-t")
    bounded = bool((errors <= counts).all())
    if bounded and rate == 1:
        return Interval(1.0, float(tail ** (1 / n)), 1.0, n, "logit-t")
    method = "logit-t" if bounded else "log-t"
    if len(errors) < 2:
        return Interval(rate, np.nan, np.nan, n, method)
    residuals = (errors - rate * counts) / counts.mean()
    half = _t(confidence, len(errors) - 1) * residuals.std(ddof=1) / np.sqrt(len(errors))
    if bounded:
        middle, half = np.log(rate / (1 - rate)), half / (rate * (1 - rate))
        low, high = (1 / (1 + np.exp(-value)) for value in (middle - half, middle + half))
    else:
        low, high = rate * np.exp(-half / rate), rate * np.exp(half / rate)
    return Interval(rate, float(low), float(high), n, method)


def paired_difference(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Return the rate of `first` minus that of `second`, each (errors, counts) of the same n clips in the same order,
    with the percentile interval of a bootstrap that draws clips, for both at once. Means have counts of 1.

    One clip fewer than there are is drawn, since n draws of n give too small a variance by (n - 1) / n (Rao & Wu 1988,
    J. Am. Stat. Assoc. 83:231).
    """
    arrays = [np.asarray(part, float) for pair in (first, second) for part in pair]
    n = len(arrays[0])
    if any(len(array) != n for array in arrays) or n == 0:
        raise ValueError(f"clips {[len(array) for array in arrays]}: pairs are of the same clips")

    def difference(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    table, random = np.stack(arrays, axis=1), np.random.default_rng(seed)
    value, drawn = float(difference(table.sum(0))), []
    if n == 1:
        return Interval(value, np.nan, np.nan, n, "paired bootstrap")
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        drawn.append(difference(random.multinomial(n - 1, np.full(n, 1 / n), size) @ table))
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high), n, "paired bootstrap")


def jackknife(n: int, statistic: Callable[[np.ndarray], float], groups: int, confidence: float, seed: int) -> Interval:
    """Return statistic(places of all n clips) with the t interval of a delete-a-group jackknife: `groups` groups, or n
    if they are fewer, by a fixed shuffle. Of a difference of two systems, the statistic takes both."""
    places = np.random.default_rng(seed).permutation(n)
    parts = np.array_split(places, min(groups, n))
    value = statistic(np.arange(n))
    if len(parts) < 3 or n - max(map(len, parts)) < 2:
        return Interval(value, np.nan, np.nan, n, "jackknife")
    without = np.array([statistic(np.setdiff1d(places, part)) for part in parts])
    count = len(parts)
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    half = _t(confidence, count - 1) * error
    return Interval(value, float(value - half), float(value + half), n, "jackknife")


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean difference over seeds: the share of all sign patterns whose mean is as far
    from 0. With n seeds it is at least 2 / 2^n. Beyond 16 seeds, 2^16 patterns are drawn."""
    differences = np.asarray(differences, float)
    count = len(differences)
    if count <= _FLIPPED:
        signs = np.array(list(product((-1, 1), repeat=count)))
    else:
        drawn = np.random.default_rng(0).choice((-1, 1), (2**_FLIPPED, count))
        signs = np.vstack((drawn, np.ones((1, count))))
    means = np.abs((signs * differences).sum(1))
    return float((means >= means[-1] * (1 - 1e-12)).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values, corrected for their number (Holm 1979), in their order."""
    order = np.argsort(p_values)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _t(confidence: float, freedom: int) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, freedom))
