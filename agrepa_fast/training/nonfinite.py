"""Steps whose loss or gradient is not finite: all ranks leave them out together, and name their clips.

Nothing is decided on the host and no rank is asked anything while all is well. What is not finite anywhere makes the
engine's own gradient not finite on that rank (`guarded`, `make_gradient_nan`); reducing spreads it to all ranks; and
engine.step(), which reads the global norm anyway, leaves weights, moments and step counts as they are.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import UserError
from ..ranks import all_gather
from ..zero.update_ratio import weight_norm
from .metrics import Metrics

FILE = "skipped.jsonl"
_NAMED = 8  # clips in the log line; skipped.jsonl has them all


def guarded(loss: torch.Tensor) -> torch.Tensor:
    """The loss, whose every gradient is NaN when it is not finite itself: one that overflowed has finite ones."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


@dataclass
class SkipGuard:
    """What one rank does after engine.step()."""

    engine: object
    metrics: Metrics
    folder: Path  # of the run
    max_skipped: int
    in_row: int = 0

    def skipped(self, step: int, clips: list[tuple[tuple[str, ...], torch.Tensor]]) -> bool:
        """Whether the step was left out; the same on every rank, and every rank must call it. If so, its clips are
        written down, and the schedule goes on. clips: keys and flow losses (B,) of this rank's micro-batches. Raises
        UserError after train.max_skipped in a row."""
        if self.engine.was_step_applied():
            self.in_row = 0
            return False
        self.in_row += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was updated before it, when the first step is skipped
            self.engine.lr_scheduler.step()  # the engine does so only after an update
        keys = [key for batch, _ in clips for key in batch]
        losses = torch.cat([loss for _, loss in clips]).tolist()
        bad = [key for key, loss in zip(keys, losses, strict=True) if not torch.tensor(loss).isfinite()]
        ranks = all_gather({"rank": dist.get_rank(), "clips": keys, "not_finite": bad})
        bad = [key for rank in ranks for key in rank["not_finite"]]
        if dist.get_rank() == 0:
            with (self.folder / FILE).open("a") as file:
                file.write(json.dumps({"step": step + 1, "ranks": ranks}) + "\n")
        named = bad or [key for rank in ranks for key in rank["clips"]]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        what = "flow loss of" if bad else "gradient of the batch of"
        self.metrics.say(
            f"step {step + 1} skipped: not finite, {what} {', '.join(named[:_NAMED])}{more}; all clips are in {FILE}"
        )
        if self.in_row >= self.max_skipped:
            raise UserError(
                f"{self.in_row} steps in a row were not finite, up to step {step + 1}: look at the clips in "
                f"{self.folder / FILE}, or lower train.lr; checkpoints are as they were"
            )
        return True

    def check_weights(self, step: int) -> None:
        """Raise UserError when a weight is not finite (or so large that their squares are not), before it is saved.
        Every rank must call it."""
        if not weight_norm(self.engine).isfinite():
            raise UserError(
                f"the weights are not finite after step {step}: lower train.lr; checkpoints are as they were"
            )
