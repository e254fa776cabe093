"""Keys of random draws: they depend on the run's seed, the step and the clip, never on the rank."""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .config import Config


def derive_seed(*parts: int | str) -> int:
    """Return a signed 64-bit seed that depends on its parts alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def clip_keys(seed: int, step: int, places: Iterable[int], stream: str) -> torch.Tensor:
    """Return keys (C,) int64 of independent random streams, one per clip.

    places: of the clips in the global batch. stream: names the use of the draws.
    """
    return torch.tensor([derive_seed(seed, step, int(place), stream) for place in places], dtype=torch.int64)


def draws_seed(config: "Config") -> int:
    """Return the seed of a run's clips, noise, flow times and masks. A run that starts from given weights draws others
    than one of its seed that starts from random weights, since they may be that one's."""
    return config.run.seed if config.train.start_from is None else derive_seed(config.run.seed, "train.start_from")
