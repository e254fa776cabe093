"""A checkpoint as `agrepa probe` and `agrepa sample` use it: its model, its configuration and its shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoints.find import resolve_checkpoint
from ..checkpoints.shard_facts import as_trained
from ..checkpoints.weights import load_model
from ..config import Config
from ..config_file import check_used, load_config
from ..data.index import Index
from ..data.matching import matching_index
from ..errors import UserError
from ..files import check_writable
from ..launch import local_device
from ..models.backbone import Backbone

_SAMPLER = ("steps", "guidance", "guidance_without", "solver", "schedule", "sway")
SAMPLING = ("flow.sigma", "flow.max_reference", *(f"flow.{name}" for name in _SAMPLER))  # what a sample depends on


def check_out(out: Path) -> None:
    """Raise UserError unless an evaluation or a comparison may be written into a folder: that of a run has files of the
    same names."""
    if (out / "config.yaml").exists():
        raise UserError(f"--out {out} holds a run or an export: choose another folder")
    check_writable(out, "--out")


class OpenedCheckpoint(NamedTuple):
    """model: on `device`; config: the run's, with overrides; path: the folder of the checkpoint."""

    model: Backbone
    config: Config
    index: Index
    path: Path
    device: torch.device

    def beside(self, name: str) -> Path:
        """Return runs/<run>/<name>-<tag>. The run may rotate the checkpoint's own folder away."""
        run = self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path.parent
        return run / f"{name}-{self.path.name}"


def open_checkpoint(checkpoint: Path, overrides: Sequence[str], *, live: bool, uses: Sequence[str]) -> OpenedCheckpoint:
    """Load a run's newest checkpoint, one of its checkpoints, or an export.

    live: the live weights instead of their moving average. uses: the sections, or single settings, that the caller has
    a use for. Raises UserError for overrides of others, and if the shards do not fit.
    """
    path = resolve_checkpoint(checkpoint)
    model, saved = load_model(path, live=live)
    config = load_config(path / "config.yaml", overrides)
    if config.model != saved.model:
        raise UserError("model.* is the checkpoint's: it cannot be overridden here")
    for section, name in (("flow", "prediction"), ("data", "normalize")):
        if getattr(getattr(config, section), name) != getattr(getattr(saved, section), name):
            raise UserError(f"{section}.{name} is the checkpoint's: it cannot be overridden here")
    check_used(overrides, uses)
    device = local_device()
    return OpenedCheckpoint(model.to(device), config, as_trained(matching_index(config.data), path), path, device)
