"""Intervals over listeners and clips: coverage on simulated ratings."""

import numpy as np
import pytest

from agrepa_fast.evaluation.crossed import crossed_interval


def simulated_ratings(random, listeners: int, clips: int, of_listeners: float, of_clips: float, mean: float = 3.3):
    """Ratings of 1 to 5 with spreads of listeners, of clips, and of single ratings."""
    scores = mean + random.normal(0, of_listeners, (listeners, 1)) + random.normal(0, of_clips, (1, clips))
    return np.clip(np.round(scores + random.normal(0, 0.7, (listeners, clips))), 1, 5)


@pytest.mark.parametrize(
    ("listeners", "clips", "of_listeners", "of_clips"),
    [(6, 10, 0.4, 0.3), (12, 20, 0.4, 0.3), (20, 12, 0.4, 0.5), (5, 20, 0.6, 0.2), (10, 10, 0.1, 0.6)],
)
def test_the_interval_covers_the_mean_opinion(listeners, clips, of_listeners, of_clips):
    random = np.random.default_rng(0)
    truth = simulated_ratings(random, 3000, 3000, of_listeners, of_clips).mean()
    hits = 0
    for number in range(300):
        ratings = simulated_ratings(random, listeners, clips, of_listeners, of_clips)
        interval = crossed_interval(ratings, 0.95, 500, number)
        hits += interval.low <= truth <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_listeners_and_clips_both_widen_it():
    """Many ratings by listeners who agree with themselves are few opinions."""
    random = np.random.default_rng(1)
    width = {}
    for name, spreads in {"neither": (0, 0), "listeners": (0.8, 0), "clips": (0, 0.8)}.items():
        interval = crossed_interval(simulated_ratings(random, 8, 8, *spreads))
        width[name] = interval.high - interval.low
    assert min(width["listeners"], width["clips"]) > 1.5 * width["neither"]


def test_one_listener_or_one_clip_has_no_interval():
    for shape in ((1, 9), (9, 1)):
        interval = crossed_interval(np.full(shape, 3.0))
        assert interval.value == 3
        assert np.isnan([interval.low, interval.high]).all()
    with pytest.raises(ValueError, match="no ratings"):
        crossed_interval(np.zeros((0, 3)))
