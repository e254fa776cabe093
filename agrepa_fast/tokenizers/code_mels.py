"""The mean log-mel that each token id stands for, and the file that holds it."""

import numpy as np

from .base import tokens_of_frames
from .kmeans import Codebook


class CodeMels:
    """Mean log-mel per code, summed clip by clip in float64. The model's token embeddings start from it."""

    def __init__(self, codes: int, n_mels: int) -> None:
        self.sums = np.zeros((codes, n_mels))
        self.counts = np.zeros(codes, np.int64)

    def add(self, tokens: np.ndarray, mel: np.ndarray) -> None:
        """Add one train clip: tokens (S,) from 0 on, mel (T, n_mels)."""
        codes, where = np.unique(tokens_of_frames(tokens, len(mel)), return_inverse=True)
        one_hot = (where == np.arange(len(codes))[:, None]).astype(np.float64)  # (codes of the clip, T)
        self.sums[codes] += one_hot @ mel.astype(np.float64)
        self.counts[codes] += np.bincount(where)

    def means(self) -> np.ndarray:
        """Return (codes, n_mels) float32. A code without train frames gets the mean of all frames."""
        overall = self.sums.sum(axis=0) / max(1, self.counts.sum())
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, means, overall).astype(np.float32)


def codebook_bytes(codebook: Codebook | None, mels: np.ndarray) -> bytes:
    """Return the content of `codebook-<domain>.safetensors`: `mel` (codes, n_mels) and, of k-means, `centroids`
    (codes, dim), float32."""
    from safetensors.numpy import save

    tensors = {"mel": np.ascontiguousarray(mels)}
    return save(tensors if codebook is None else {"centroids": codebook.centroids, **tensors})
