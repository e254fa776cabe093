"""The context of a run: its settings, shards, device, rank and folder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..data.index import Index
from ..seeds import draws_seed


@dataclass(frozen=True)
class RunContext:
    """The settings of a run, its shards and its folder, and the place of this process among the ranks."""

    config: Config  # with the sizes that the shards decide, run.dir and run.id
    index: Index
    device: torch.device
    rank: int
    world: int
    folder: Path
    generation: int = 0  # how many runs have trained the weights before this one

    @property
    def draws_seed(self) -> int:
        """The seed of the run's clips, noise, flow times and masks."""
        return draws_seed(self.config.run.seed, self.generation)
