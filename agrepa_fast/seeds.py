"""Keys of random draws: they depend on the run's seed, the step and the clip, never on the rank."""

import hashlib
from collections.abc import Iterable

import torch


def derive_seed(*parts: int | str) -> int:
    """A signed 64-bit seed that depends on its parts alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def clip_keys(seed: int, step: int, places: Iterable[int], stream: str) -> torch.Tensor:
    """(C,) int64 keys of independent random streams, one for each (seed, step, place in the global batch, use)."""

    return torch.tensor([derive_seed(seed, step, int(place), stream) for place in places], dtype=torch.int64)
