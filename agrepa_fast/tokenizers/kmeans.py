"""Tokenizers, which turn a clip into int32 ids, and the simplest of them: a k-means codebook over a teacher's frames.

`kmeans` is fitted in preparation and `vq:FILE` before it (vq.py), both on a teacher's frames; `s3:NAME` takes waves
(s3.py). Each code also carries the mean log-mel of the train frames it stands for: the model's token embeddings start
from it.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError

FIT_FRAMES_PER_CODE = 256  # more frames than this per code do not move k-means' centroids
MAX_FIT_FRAMES = 2**18  # 1.3 GB of 1280-d frames
_ITERATIONS = 20


def fit_frames(codes: int) -> int:
    """Frames that are enough to fit `codes` codes."""
    return min(codes * FIT_FRAMES_PER_CODE, MAX_FIT_FRAMES)


class FrameTokenizer(ABC):
    """Ids of a teacher's frames: `codes` different ones, each for `stride` frames."""

    codes: int
    stride: int = 1
    identity: dict  # of one that preparation does not fit

    @abstractmethod
    def encode(self, frames: np.ndarray) -> np.ndarray:
        """One clip's frames (S, dim), fp16 or float32 -> (ceil(S / stride),) int32."""


class WaveTokenizer(ABC):
    """Ids of waves at `sample_rate` Hz: `codes` different ones, `rate` a second; identity as of a Teacher."""

    codes: int
    rate: float
    sample_rate: int
    identity: dict

    @abstractmethod
    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves (samples,) float32 of any lengths -> per wave (S,) int32, whatever else is in the list."""


@dataclass(frozen=True)
class Codebook(FrameTokenizer):
    """Nearest-centroid codes of a teacher's frames; centroids (codes, dim) float32."""

    centroids: np.ndarray

    @property
    def codes(self) -> int:
        return len(self.centroids)

    @classmethod
    def fit(cls, frames: np.ndarray, codes: int, domain: str, seed: int = 0) -> "Codebook":
        """k-means over frames (n, dim) float32, from random frames. UserError for fewer frames than codes."""
        from scipy.cluster.vq import kmeans2

        if len(frames) < codes:
            raise UserError(
                f"data.codebook={codes}: the {domain} train clips have only {len(frames)} teacher frames: "
                f"add recordings, or set data.codebook={max(1, len(frames) // 4)} or less"
            )
        # Not "++": SciPy's takes minutes for 256 codes (2.5 s in all from random frames). Identical frames (silence)
        # may start two codes, one of which then stays empty where it is; that is no fault.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="One of the clusters is empty")
            rng = np.random.default_rng(seed)
            centroids, _ = kmeans2(frames.astype(np.float32), codes, iter=_ITERATIONS, minit="points", rng=rng)
        return cls(np.ascontiguousarray(centroids, np.float32))

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """frames (S, dim) -> (S,) int32, the index of the nearest centroid."""
        # |f - c|^2 = |f|^2 + 2 (|c|^2 / 2 - f c): the nearest has the smallest bracket. By torch, as the teacher is:
        # a second pool of threads, numpy's, would compete with its.
        centroids = torch.from_numpy(self.centroids)
        half_norms = 0.5 * (centroids**2).sum(dim=1)
        distances = torch.addmm(half_norms, torch.from_numpy(frames).float(), centroids.T, alpha=-1)
        return distances.argmin(dim=1).int().numpy()


def tokens_of_frames(tokens: np.ndarray, frames: int) -> np.ndarray:
    """The token at the middle of each of `frames` mel frames, or other equal parts of the clip: (S,) -> (frames,)."""
    return tokens[((np.arange(frames) + 0.5) * len(tokens) / frames).astype(np.int64)]


class CodeMels:
    """Mean log-mel per code, summed clip by clip in float64."""

    def __init__(self, codes: int, n_mels: int) -> None:
        self.sums = np.zeros((codes, n_mels))
        self.counts = np.zeros(codes, np.int64)

    def add(self, tokens: np.ndarray, mel: np.ndarray) -> None:
        """One train clip: tokens (S,) int local to the codebook, mel (T, n_mels)."""
        codes, where = np.unique(tokens_of_frames(tokens, len(mel)), return_inverse=True)
        one_hot = (where == np.arange(len(codes))[:, None]).astype(np.float64)  # (codes of the clip, T)
        self.sums[codes] += one_hot @ mel.astype(np.float64)
        self.counts[codes] += np.bincount(where)

    def means(self) -> np.ndarray:
        """(codes, n_mels) float32; a code that no train frame has gets the mean of all frames."""
        overall = self.sums.sum(axis=0) / max(1, self.counts.sum())
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, means, overall).astype(np.float32)


def codebook_bytes(codebook: Codebook | None, mels: np.ndarray) -> bytes:
    """The content of `codebook-<domain>.safetensors`: `mel` (codes, n_mels) and, of k-means, `centroids` (codes, dim),
    float32."""
    from safetensors.numpy import save

    tensors = {"mel": np.ascontiguousarray(mels)}
    return save(tensors if codebook is None else {"centroids": codebook.centroids, **tensors})
