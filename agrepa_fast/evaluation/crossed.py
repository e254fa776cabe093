"""Intervals of mean ratings for which listeners and clips are both a sample: other listeners and other clips would give
other ratings."""

import numpy as np

from .intervals import Interval

_CHUNK = 500  # resamples drawn at once


def crossed_interval(ratings: np.ndarray, confidence: float = 0.95, resamples: int = 4000, seed: int = 0) -> Interval:
    """Return the mean of ratings (listeners, clips) with the percentile interval of a crossed bootstrap, which draws
    listeners and clips independently, for all at once (Owen 2007, "The pigeonhole bootstrap", Ann. Appl. Stat. 1:386).

    One listener and one clip fewer than there are is drawn, since n draws of n give too small a variance by (n - 1) / n
    (Rao & Wu 1988, J. Am. Stat. Assoc. 83:231). Of a difference of two systems, pass the differences of the ratings. n:
    of ratings. low and high are NaN for less than two listeners or two clips. Raises ValueError for no ratings.
    """
    ratings = np.asarray(ratings, float)
    if ratings.size == 0:
        raise ValueError("no ratings: there is no mean")
    value, (listeners, clips) = float(ratings.mean()), ratings.shape
    if min(listeners, clips) < 2:
        return Interval(value, np.nan, np.nan, ratings.size, "crossed bootstrap")
    random, drawn = np.random.default_rng(seed), []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        rows, columns = (random.multinomial(n - 1, np.full(n, 1 / n), size) / (n - 1) for n in (listeners, clips))
        drawn.append(((rows @ ratings) * columns).sum(1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high), ratings.size, "crossed bootstrap")
