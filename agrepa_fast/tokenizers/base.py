"""The interface of tokenizers."""

from abc import ABC, abstractmethod

import numpy as np


class FrameTokenizer(ABC):
    """Turns a teacher's frames into ids.

    codes     number of ids
    stride    frames per id
    identity  must be equal for two sets of ids to be comparable, as of a Teacher; preparation fits k-means itself, and
              gives it none
    """

    codes: int
    stride: int = 1
    identity: dict

    @abstractmethod
    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Return (ceil(S / stride),) int32 of one clip's frames (S, dim), fp16 or float32."""


class WaveTokenizer(ABC):
    """Turns waves, or their transcripts at the times of the wave, into ids.

    codes        number of ids
    rate         ids per second
    sample_rate  Hz, of the waves that it takes
    identity     must be equal for two sets of ids to be comparable, as of a Teacher
    """

    codes: int
    rate: float
    sample_rate: int
    identity: dict

    @abstractmethod
    def encode(self, waves: list[np.ndarray], texts: list[str]) -> list[np.ndarray | str]:
        """Return per wave (samples,) float32, with its transcript ("" if it has no transcript), its ids (S,) int32,
        or the reason why it has no ids. The ids of a wave do not depend on the others."""


def tokens_of_frames(tokens: np.ndarray, frames: int) -> np.ndarray:
    """Return (frames,) from tokens (S,) that span the same clip: per frame the token at the time of its middle."""
    return tokens[((np.arange(frames) + 0.5) * len(tokens) / frames).astype(np.int64)]
