"""Weights & Biases, which gets the numbers of metrics.jsonl too if train.wandb is set."""

import sys
from dataclasses import asdict

from ..config import TrainConfig
from ..errors import UserError, one_line
from .context import RunContext


def check_tracker(train: TrainConfig) -> None:
    """Raise UserError if train.wandb is set and the package is missing."""
    if train.wandb is not None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError("train.wandb: pip install wandb, or set train.wandb=null") from error


class Wandb:
    """One run of a W&B project. A resumed run continues its W&B run; WANDB_MODE=offline works."""

    def __init__(self, context: RunContext):
        import wandb

        self._run = wandb.init(
            project=context.config.train.wandb,
            name=context.folder.name,
            id=context.config.run.id,  # folders of the same name are different runs
            resume="allow",
            dir=str(context.folder),
            config=asdict(context.config),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run writes some steps again

    def write(self, step: int, values: dict[str, float]) -> None:
        """Send the values of a step. If they cannot be sent they are lost, and training goes on."""
        try:
            self._run.log({"step": step, **values})
        except Exception as error:  # W&B's own, and the network's
            print(f"step {step}: train.wandb: {one_line(error)}; training goes on", file=sys.stderr)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def open_tracker(context: RunContext) -> Wandb | None:
    """Return the tracker that train.wandb asks for; None without one, and on all ranks but 0. Raises UserError if W&B
    refuses the run, which it does without a login."""
    project = context.config.train.wandb
    if project is None or context.rank != 0:
        return None
    try:
        return Wandb(context)
    except Exception as error:  # W&B's own, and the network's
        remedy = "log in with `wandb login`, export WANDB_MODE=offline, or set train.wandb=null"
        raise UserError(f"train.wandb={project}: {one_line(error)}: {remedy}") from error
