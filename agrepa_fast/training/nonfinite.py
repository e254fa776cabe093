"""Steps whose loss or gradient is not finite: all ranks leave them out together, and name their clips.

While all values are finite, the host decides nothing and no rank asks another. A loss or a head's gradient that is not
finite makes the engine's own gradient NaN on that rank (`nan_gradient_unless_finite`, `make_gradient_nan`). Reducing
spreads the NaN to all ranks, and engine.step(), which reads the global norm anyway, then keeps weights, moments and
step counts as they are.
"""

import json
import warnings

import torch

from ..files import append_text
from ..ranks import AgreedError, all_gather
from ..zero.update_ratio import weight_norm
from .context import RunContext
from .metrics import Metrics

FILE = "skipped.jsonl"
_NAMED = 8  # clips in the printed line; skipped.jsonl has all of them


def nan_gradient_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss. If it is not finite, all its gradients become NaN: those of a loss that overflowed may be
    finite."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class NonFiniteSteps:
    """Finds the steps that the engine has left out, and stops a run that has too many in a row."""

    def __init__(self, context: RunContext, engine, metrics: Metrics):
        self.context, self.engine, self.metrics = context, engine, metrics
        self.in_row = 0

    def skipped(self, step: int, clips: list[tuple[tuple[str, ...], torch.Tensor]]) -> bool:
        """Return whether engine.step() left the step out; the same on every rank. Every rank must call it.

        clips: keys and flow losses (B,) of this rank's micro-batches. If the step was left out, they are written to
        skipped.jsonl and the learning-rate schedule advances. Raises UserError after train.max_skipped in a row.
        """
        if self.engine.was_step_applied():
            self.in_row = 0
            return False
        self.in_row += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if the first step of all updates nothing
            self.engine.lr_scheduler.step()  # the engine does so only after an update
        keys = [key for batch, _ in clips for key in batch]
        losses = torch.cat([loss for _, loss in clips])
        bad = [key for key, finite in zip(keys, losses.isfinite().tolist(), strict=True) if not finite]
        ranks = all_gather({"rank": self.context.rank, "clips": keys, "not_finite": bad})
        path = self.context.folder / FILE
        if self.context.rank == 0:
            line = json.dumps({"step": step + 1, "ranks": ranks}) + "\n"
            if reason := append_text(path, line):
                self.metrics.print(f"step {step + 1}: {FILE} could not be written ({reason}); training goes on")
        bad = [key for rank in ranks for key in rank["not_finite"]]
        named = bad or [key for rank in ranks for key in rank["clips"]]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        culprit = "flow loss of" if bad else "gradient of the batch of"
        self.metrics.print(
            f"step {step + 1} skipped: not finite, {culprit} {', '.join(named[:_NAMED])}{more}; all clips are in {FILE}"
        )
        if self.in_row >= self.context.config.train.max_skipped:
            raise AgreedError(
                f"{self.in_row} steps in a row were not finite, up to step {step + 1}: look at the clips in "
                f"{path}, or lower train.lr; checkpoints are as they were"
            )
        return True

    def check_weights(self, step: int) -> None:
        """Raise UserError if a weight is not finite, or so large that its square is not. Call it before a checkpoint is
        saved, on every rank."""
        if not weight_norm(self.engine).isfinite():
            raise AgreedError(
                f"the weights are not finite after step {step}: lower train.lr; checkpoints are as they were"
            )
