"""Weights & Biases beside metrics.jsonl and TensorBoard, where it is installed and asked for."""

from dataclasses import asdict
from pathlib import Path

from ..config import Config, TrainConfig
from ..errors import UserError


def find_tracker(train: TrainConfig) -> None:
    """Raise UserError when train.wandb is set and the package is missing."""
    if train.wandb is not None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError("train.wandb: pip install wandb, or set train.wandb=null") from error


class Wandb:
    """One run of a project, named after the run's folder; a resumed run goes on in it. WANDB_MODE=offline works."""

    def __init__(self, config: Config, folder: Path):
        import wandb

        self._run = wandb.init(
            project=config.train.wandb,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            config=asdict(config),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run writes steps again

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def open_tracker(config: Config, folder: Path, rank: int) -> Wandb | None:
    """What rank 0 hands its metrics to as well; None when nothing was asked for, and on other ranks."""
    return Wandb(config, folder) if config.train.wandb is not None and rank == 0 else None
