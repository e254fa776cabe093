"""Distances of sets against closed forms."""

from pathlib import Path

import numpy as np
import pytest

import agrepa_fast.evaluation
from agrepa_fast.evaluation.distances import frechet, frechet_infinity, median_distance, mmd


def whitened(clips: int, dim: int, seed: int) -> np.ndarray:
    """Draws whose sample mean is 0 and whose sample covariance is the identity, exactly."""
    x = np.random.default_rng(seed).standard_normal((clips, dim))
    x -= x.mean(0)
    return np.linalg.qr(x)[0] * np.sqrt(clips - 1)


def test_frechet_of_two_gaussians_with_exact_moments():
    random = np.random.default_rng(0)
    s1, s2, m1, m2 = random.uniform(0.1, 3, 6), random.uniform(0.1, 3, 6), random.normal(size=6), random.normal(size=6)
    x, y = whitened(40, 6, 1) * s1 + m1, whitened(60, 6, 2) * s2 + m2
    assert frechet(x, y) == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum(), abs=1e-10)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_equals_the_eigenvalues_and_does_not_change_with_a_rotation():
    random = np.random.default_rng(3)
    x, y = random.normal(size=(50, 5)) @ random.normal(size=(5, 5)), random.normal(size=(70, 5)) + 1
    cx, cy = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(cx @ cy).real).sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * root
    turn = np.linalg.qr(random.normal(size=(5, 5)))[0]
    assert frechet(x, y) == pytest.approx(wanted, rel=1e-10)
    assert frechet(x @ turn, y @ turn) == pytest.approx(wanted, rel=1e-10)


def test_frechet_with_fewer_clips_than_dimensions_is_finite_and_not_negative():
    random = np.random.default_rng(4)
    for _ in range(20):
        value = frechet(random.normal(size=(12, 64)), random.normal(size=(30, 64)))
        assert np.isfinite(value)
        assert value >= 0
    with pytest.raises(ValueError, match="at least two"):
        frechet(np.zeros((1, 3)), np.zeros((5, 3)))


def test_frechet_is_biased_and_the_extrapolation_is_nearer():
    random = np.random.default_rng(5)
    small, large, extrapolated = [], [], []
    for seed in range(12):
        reference = random.normal(size=(1500, 24))
        x = random.normal(size=(400, 24))
        small.append(frechet(x[:48], reference))
        large.append(frechet(x, reference))
        extrapolated.append(frechet_infinity(x[:48], reference, seed))
    assert np.mean(small) > 3 * np.mean(large) > 0
    assert abs(np.mean(extrapolated)) < 0.5 * np.mean(small)
    assert frechet_infinity(x[:48], reference, 1) == frechet_infinity(x[:48], reference, 1)


@pytest.mark.filterwarnings("error")  # of a line through one point
@pytest.mark.parametrize("clips", [2, 3, 4, 5, 9])
def test_the_extrapolation_of_few_clips_is_finite(clips):
    random = np.random.default_rng(8)
    x, y = random.normal(size=(clips, 3)), random.normal(size=(20, 3))
    assert np.isfinite(frechet_infinity(x, y, 0))
    for left_out in range(clips if clips > 2 else 0):
        assert np.isfinite(frechet_infinity(x, y, 0, np.delete(np.arange(clips), left_out)))
    assert clips > 2 or frechet_infinity(x, y, 0) == frechet(x, y)


def test_mmd_has_no_bias():
    random = np.random.default_rng(6)
    values = []
    for _ in range(400):
        x, y = random.normal(size=(20, 4)), random.normal(size=(20, 4))
        values.append(mmd(x, y, 2.0))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error  # with pairs of a clip and itself the mean is 26 errors off


def test_mmd_of_gaussians_is_the_closed_form():
    """E k(x, y) of N(0, I) and N(m, I), with g = bandwidth^2: (g / (g + 2))^(d/2) exp(-|m|^2 / (2 (g + 2)))."""
    random, dim, shift, g = np.random.default_rng(7), 3, 0.8, 1.5**2
    values = []
    for _ in range(30):
        x, y = random.normal(size=(800, dim)), random.normal(size=(800, dim))
        values.append(mmd(x, y + np.array([shift, 0, 0]), 1.5))
    wanted = 1000 * 2 * (g / (g + 2)) ** (dim / 2) * (1 - np.exp(-(shift**2) / (2 * (g + 2))))
    assert np.mean(values) == pytest.approx(wanted, abs=3 * np.std(values) / np.sqrt(30))
    values = [mmd(x[:200] + shift, y[:200], 1.5) for shift in (0, 1, 2, 4)]
    assert values == sorted(values)


def test_the_bandwidth_is_the_median_distance_of_the_reference():
    assert median_distance(np.array([[0.0, 0], [3, 4], [6, 8]])) == pytest.approx(5)


def test_no_matrix_square_root_and_no_bootstrap_of_a_distance():
    source = "\n".join(path.read_text() for path in Path(agrepa_fast.evaluation.__file__).parent.glob("*.py"))
    assert "sqrtm" not in source
