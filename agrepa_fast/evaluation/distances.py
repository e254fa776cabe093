"""Distances between two sets of clip embeddings, each (clips, dim): Fréchet, its extrapolation, and MMD.

A clip is one vector, the mean over its time. The reference must hold other clips than the evaluated ones: a set
compared with its own truths has a Fréchet distance of 0 and a negative MMD by construction.
"""

import numpy as np

_ORDERS, _PARTS = 4, 4  # random orders of the clips in `frechet_infinity`; each is split into 1 to _PARTS parts


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


def frechet_infinity(x: np.ndarray, y: np.ndarray, seed: int, places: np.ndarray | None = None) -> float:
    """Return the Fréchet distance of x from the reference y for infinitely many clips of x: where a line through the
    distances of subsets of x meets 1 / clips = 0 (Chong & Forsyth 2020; Gui et al. 2023).

    The subsets are all clips, halves, thirds and quarters, which random orders are split into: so each clip counts as
    often as any other. The bias of the reference stays. places: of the clips that count, None for all. The orders are
    of all clips, and the parts lose the others: a jackknife would take other parts for an effect of the clips left out.
    """
    random, reference = np.random.default_rng(seed), _moments(y)
    counts = np.ones(len(x), bool) if places is None else np.isin(np.arange(len(x)), places)
    orders, points = [random.permutation(len(x)) for _ in range(_ORDERS)], []
    for parts in range(1, _PARTS + 1):
        split = [part for order in orders[: None if parts > 1 else 1] for part in np.array_split(order, parts)]
        subsets = [kept for part in split if len(kept := part[counts[part]]) > 1]
        if subsets:
            values = [_frechet(_moments(x[subset]), reference) for subset in subsets]
            points.append((np.mean([1 / len(subset) for subset in subsets]), np.mean(values)))
    inverse, values = zip(*points, strict=True)
    return float(np.polyfit(inverse, values, 1)[1] if np.ptp(inverse) > 1e-9 else np.mean(values))


def median_distance(y: np.ndarray) -> float:
    """Return the median distance between two clips: of the reference, the bandwidth of `mmd`."""
    return float(np.sqrt(np.median(_squares(y, y)[np.triu_indices(len(y), 1)])))


def mmd(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    """Return 1000 x the unbiased squared maximum mean discrepancy with the kernel exp(-d^2 / (2 bandwidth^2)).

    It is ten times KAD (Chung et al. 2025) of the same vectors, since KAD's code has the factor 100. Its expectation is
    0 for two sets of one distribution, at any number of clips; so it may be negative. Raises ValueError for fewer than
    two clips."""
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
