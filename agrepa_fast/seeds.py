"""Keys of random draws: they depend on the run's seed, the step and the clip, never on the rank."""

import hashlib
from collections.abc import Iterable

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a signed 64-bit seed that depends on its parts alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def clip_keys(seed: int, step: int, places: Iterable[int], stream: str) -> torch.Tensor:
    """Return keys (C,) int64 of independent random streams, one per clip.

    places: of the clips in the global batch. stream: names the use of the draws.
    """
    return torch.tensor([derive_seed(seed, step, int(place), stream) for place in places], dtype=torch.int64)


def draws_seed(seed: int, generation: int) -> int:
    """Return the seed of a run's clips, noise, flow times and masks. seed: run.seed. generation: how many runs have
    trained its weights before it; they may have had its seed, and it draws others than they did."""
    if generation == 0:
        return seed
    seed = derive_seed(seed, "train.start_from")
    return seed if generation == 1 else derive_seed(seed, generation)
