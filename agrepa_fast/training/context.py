"""The context of a run: its settings, shards, device, rank and folder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..data.index import Index


@dataclass(frozen=True)
class RunContext:
    """The settings of a run, its shards and its folder, and the place of this process among the ranks."""

    config: Config  # with the sizes that the shards decide, run.dir and run.id
    index: Index
    device: torch.device
    rank: int
    world: int
    folder: Path
