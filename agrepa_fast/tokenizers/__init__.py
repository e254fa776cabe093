"""Tokenizers turn a clip into int32 ids: `kmeans` and `vq:FILE` from a teacher's frames, `s3:NAME` and `phones`
from waves.

A k-means codebook is fitted in preparation, a vector quantiser before it, by `agrepa tokens fit`.
"""

from ..files import local_path
from .base import FrameTokenizer, WaveTokenizer

__all__ = ["FrameTokenizer", "WaveTokenizer", "load_tokenizer"]


def load_tokenizer(spec: str, device: str = "cpu") -> FrameTokenizer | WaveTokenizer:
    """Return the tokenizer of vq:FILE, s3:NAME, s3:FILE or phones. Raises UserError if it cannot be loaded."""
    from .phones import load_phones
    from .s3 import load_s3
    from .vq import VqTokenizer

    kind, _, source = spec.partition(":")
    if kind == "phones":
        return load_phones()
    return VqTokenizer.load(local_path(source), device) if kind == "vq" else load_s3(source, device)
