"""Intervals: coverage on simulated clips, known p-values."""

import numpy as np
import pytest
import scipy.stats

from agrepa_fast.evaluation.aggregate import SetDistances
from agrepa_fast.evaluation.distances import frechet
from agrepa_fast.evaluation.intervals import (
    holm,
    jackknife,
    mean_interval,
    paired_difference,
    rate_interval,
    sign_flip,
)


def simulated_errors(random: np.random.Generator, clips: int, rate: float, spread: float = 5.0):
    """Errors of clips of 4 to 12 words whose own error rates are beta-distributed."""
    words = random.integers(4, 13, clips)
    return random.binomial(words, random.beta(rate * spread, (1 - rate) * spread, clips)), words


@pytest.mark.parametrize(("clips", "rate"), [(40, 0.3), (100, 0.1), (100, 0.7)])
def test_the_interval_of_a_rate_covers_it(clips, rate):
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        interval = rate_interval(*simulated_errors(random, clips, rate), 0.95)
        hits += interval.low <= rate <= interval.high
    assert 0.92 <= hits / 600 <= 0.98


def test_the_paired_bootstrap_covers_the_difference():
    random = np.random.default_rng(1)
    hits = 0
    for number in range(250):
        errors, words = simulated_errors(random, 100, 0.3)
        fewer = random.binomial(errors, 0.8)  # the second system mends a fifth of the errors
        interval = paired_difference((errors, words), (fewer, words), 0.95, 1000, number)
        hits += interval.low <= 0.06 <= interval.high
    assert 0.91 <= hits / 250 <= 0.985


def test_pairs_that_are_not_pairs_have_a_wider_interval():
    random = np.random.default_rng(2)
    quality, ones = random.normal(size=60), np.ones(60)
    first, second = quality + 0.1 * random.normal(size=60), quality - 0.2 + 0.1 * random.normal(size=60)
    paired = paired_difference((first, ones), (second, ones), 0.95, 2000, 0)
    mixed = paired_difference((first, ones), (random.permutation(second), ones), 0.95, 2000, 0)
    assert paired.value == pytest.approx((first - second).mean())
    assert paired.low > 0
    assert mixed.high - mixed.low > 4 * (paired.high - paired.low)
    same = paired_difference((first, ones), (first, ones), 0.95, 100, 0)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same clips"):
        paired_difference((first, ones), (second[1:], ones[1:]), 0.95, 100, 0)


def test_the_error_of_the_extrapolated_distance_is_that_of_repeated_draws():
    """With other random subsets for each group of clips it is 1.4 times as large."""
    random = np.random.default_rng(3)
    distances, values, halves = SetDistances(random.normal(size=(200, 4))), [], []
    for _ in range(60):
        x = 1.3 * random.normal(size=(60, 4)) + 0.5
        interval = jackknife(60, lambda places, x=x: distances.value("fad_inf", x, places), 10, 0.95, 0)
        values.append(interval.value)
        halves.append((interval.high - interval.low) / 2 / 2.262)  # t of 9 degrees of freedom
    assert np.mean(halves) == pytest.approx(np.std(values, ddof=1), rel=0.2)


def test_the_jackknife_s_error_of_a_frechet_distance_is_that_of_repeated_draws():
    random = np.random.default_rng(3)
    reference = random.normal(size=(300, 4))
    values, halves = [], []
    for number in range(200):
        x = 1.3 * random.normal(size=(60, 4)) + 0.5
        values.append(frechet(x, reference))
        interval = jackknife(60, lambda places, x=x: frechet(x[places], reference), 20, 0.95, number)
        assert interval.value == values[-1]
        halves.append((interval.high - interval.low) / 2 / 2.093)  # t of 19 degrees of freedom
    assert np.mean(halves) == pytest.approx(np.std(values, ddof=1), rel=0.15)


def test_rates_at_their_ends_and_above_one():
    none = rate_interval(np.zeros(20), np.full(20, 5), 0.95)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.1684, abs=1e-4)  # Clopper-Pearson of 0 of 20
    every = rate_interval(np.full(20, 5), np.full(20, 5), 0.95)
    assert every.low == pytest.approx(0.8316, abs=1e-4)
    above = rate_interval(np.array([3, 12, 5, 9]), np.array([4, 5, 6, 7]), 0.95)
    assert above.method == "log-t"
    assert 0 < above.low < above.value < above.high
    assert above.value == pytest.approx(29 / 22)
    with pytest.raises(ValueError, match="nothing was counted"):
        rate_interval(np.zeros(3), np.zeros(3), 0.95)


def test_a_mean_has_the_t_interval():
    interval = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]), 0.95)
    assert interval[:2] == (2.5, pytest.approx(2.5 - 3.1824 * 1.29099 / 2, abs=1e-3))
    alone = mean_interval(np.array([3.0]), 0.95)
    assert alone.value == 3
    assert np.isnan(alone.low)


def test_p_values():
    assert sign_flip([1, 2, 3]) == 0.25  # 2 of 8 patterns
    assert sign_flip([1, -1]) == 1
    assert sign_flip([0.5] * 6) == 2 / 64
    many = np.random.default_rng(1).normal(0, 1, 40)  # 2^40 patterns would not fit into memory
    assert sign_flip(many) == pytest.approx(scipy.stats.norm.sf(abs(many.sum()) / np.linalg.norm(many)) * 2, abs=0.01)
    assert sign_flip([0.5] * 40) < 1e-4
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
