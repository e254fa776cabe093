"""Distances between two sets of clip embeddings, each (clips, dim): Fréchet, its extrapolation, and MMD.

A clip is one vector, the mean over its frames. The reference must hold other clips than the evaluated ones: a set
compared with its own truths has a Fréchet distance of 0 and a negative MMD by construction.
"""

import numpy as np

_SIZES, _SUBSETS = 6, 8  # of the subsets whose Fréchet distances the line of `frechet_infinity` goes through


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Fréchet distance of Gaussians with the means and covariances of x and y (FAD, Kilgour et al. 2019).

    Its term Tr (Cx Cy)^1/2 is the sum of the singular values of Rx Ry^T, for Cx = Rx^T Rx: real and exact for fewer
    clips than dimensions, too, where a matrix square root is neither. It is biased upwards by about 1 / clips. Raises
    ValueError for fewer than two clips.
    """
    return _frechet(_moments(x), _moments(y))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of x, and R with R^T R its covariance."""
    if len(x) < 2:
        raise ValueError(f"{len(x)} clip: a covariance needs at least two")
    return x.mean(0), np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")


def _frechet(x: tuple[np.ndarray, np.ndarray], y: tuple[np.ndarray, np.ndarray]) -> float:
    (mean_x, rx), (mean_y, ry) = x, y
    difference, shared = mean_x - mean_y, np.linalg.svd(rx @ ry.T, compute_uv=False).sum()
    return float(difference @ difference + (rx**2).sum() + (ry**2).sum() - 2 * shared)


def frechet_infinity(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """Return the Fréchet distance of x from the reference y for infinitely many clips of x: where a line through the
    distances of subsets of x meets 1 / clips = 0 (Chong & Forsyth 2020; Gui et al. 2023).

    Eight subsets of each size, from a quarter of the clips to all, are drawn without replacement. The bias of the
    reference stays.
    """
    random, reference = np.random.default_rng(seed), _moments(y)
    sizes = np.unique(np.linspace(max(2, len(x) // 4), len(x), _SIZES).astype(int))
    values = [
        np.mean([_frechet(_moments(random.permutation(x)[:size]), reference) for _ in range(_SUBSETS)])
        for size in sizes
    ]
    if len(sizes) < 2:
        return float(values[0])
    return float(np.polyfit(1 / sizes, values, 1)[1])


def median_distance(y: np.ndarray) -> float:
    """Return the median distance between two clips: of the reference, the bandwidth of `mmd`."""
    return float(np.sqrt(np.median(_squares(y, y)[np.triu_indices(len(y), 1)])))


def mmd(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    """Return 1000 x the unbiased squared maximum mean discrepancy with the kernel exp(-d^2 / (2 bandwidth^2)), as KAD
    (Chung et al. 2025). Its expectation is 0 for two sets of one distribution, at any number of clips; so it may be
    negative. Raises ValueError for fewer than two clips."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{min(len(x), len(y))} clip: pairs need at least two")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-_squares(a, b) / (2 * bandwidth**2))

    within = [(kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(1000 * (sum(within) - 2 * kernel(x, y).mean()))


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the squared distances between the rows of a and b."""
    a, b = a - b.mean(0), b - b.mean(0)  # less to cancel
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)
