"""A k-means codebook over a teacher's frames."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError
from .base import FrameTokenizer

FIT_FRAMES_PER_CODE = 256  # more frames than this per code do not move k-means' centroids
MAX_FIT_FRAMES = 2**18  # 1.3 GB of 1280-d frames
_ITERATIONS = 20


def fit_frames(codes: int) -> int:
    """Return the number of frames that is enough to fit `codes` codes."""
    return min(codes * FIT_FRAMES_PER_CODE, MAX_FIT_FRAMES)


@dataclass(frozen=True)
class Codebook(FrameTokenizer):
    """Ids of the nearest centroids; centroids (codes, dim) float32."""

    centroids: np.ndarray

    @property
    def codes(self) -> int:
        return len(self.centroids)

    @classmethod
    def fit(cls, frames: np.ndarray, codes: int, domain: str, seed: int = 0) -> "Codebook":
        """Return the codebook of k-means over frames (n, dim), starting from random ones. Raises UserError for fewer
        frames than codes."""
        from scipy.cluster.vq import kmeans2

        if len(frames) < codes:
            raise UserError(
                f"data.codebook={codes}: the {domain} train clips have only {len(frames)} teacher frames: "
                f"add recordings, or set data.codebook={max(1, len(frames) // 4)} or less"
            )
        # Not "++": SciPy's takes minutes for 256 codes, the whole fit from random frames 2.5 s. Identical frames
        # (silence) may start two codes; one of them then stays empty, which is no fault.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="One of the clusters is empty")
            rng = np.random.default_rng(seed)
            centroids, _ = kmeans2(frames.astype(np.float32), codes, iter=_ITERATIONS, minit="points", rng=rng)
        return cls(np.ascontiguousarray(centroids, np.float32))

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Return (S,) int32, the indices of the centroids nearest to frames (S, dim)."""
        # |f - c|^2 = |f|^2 + 2 (|c|^2 / 2 - f c): the nearest has the smallest bracket. By torch, since numpy's threads
        # would compete with those that torch has for the teacher.
        centroids = torch.from_numpy(self.centroids)
        half_norms = 0.5 * (centroids**2).sum(dim=1)
        distances = torch.addmm(half_norms, torch.from_numpy(frames).float(), centroids.T, alpha=-1)
        return distances.argmin(dim=1).int().numpy()
