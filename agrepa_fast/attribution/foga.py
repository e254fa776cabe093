"""FoG-A, forward-only gate ablation: how much the predicted velocity changes when one block is left out.

AG-REPA (arXiv 2603.01006): FoG-A_k = E[ ||v without block k - v|| / (||v|| + eps) ], no gradient, kept per domain.
"""

from collections.abc import Callable, Sequence

import torch

from ..config import RECIPES, TIMES
from ..device import CapturedPrograms
from ..kernels import velocity_change
from ..models.backbone import Backbone
from ..models.condition import Condition
from .blocks import gated_parts, gating, part_names
from .calls import Trace, trace_calls
from .official import official_foga
from .points import ProbeBatch, ProbePoints, clip_times, evaluation_mode
from .rows import rounding_limit
from .scores import BatchScores, LayerScores
from .variants import Variants, check_floor


class FogaProbe:
    """FoG-A of a backbone, again and again with its live weights.

    A launch runs L(L+1)/2 block forwards per time and draw, and L for the floor. gates, kind: as foga. graph: capture
    the work of each batch shape as CUDA graphs and replay them; impossible under ZeRO-3, where weights exist only
    inside a forward.
    """

    def __init__(
        self,
        model: Backbone,
        points: ProbePoints,
        *,
        gates: torch.Tensor | None = None,
        kind: str = "block",
        graph: bool = False,
    ):
        self.model, self.points = model, points
        parts = [parts for _, parts in gated_parts(model, kind)]
        self.blocks = [block for of_layer in parts for block in of_layer]
        self.variants = Variants(gates, [len(of_layer) for of_layer in parts])
        self._gating = gating(model, kind)
        self._is_known = None not in (model.row_arguments, model.state if self._gating["kind"] == "block" else ())
        self._programs = CapturedPrograms() if graph else None

    def launch(self, batch: ProbeBatch) -> BatchScores:
        """Queue the measurement of a batch in evaluation mode, with the same noise for every variant.

        The modes of all modules and the random state are as before afterwards, also when it raises. Raises
        CaptureError if `graph` is set and the work cannot be captured.
        """
        condition, changes, silent = batch.condition.to(batch.mel.device), [], []
        with evaluation_mode(self.model), torch.no_grad():
            if self._programs is not None:
                self._programs.drop_stale(self.model.parameters())
            if not self._is_known:
                self._check_calls(batch, condition)
                self._is_known = True
            for time, draw in self.points:
                x_t, t = self.points.x_t(batch, time, draw), clip_times(batch, time)
                change, base, is_zero = self._run(self._ablate, x_t, t, condition)
                changes.append(change)
                silent.append(is_zero)
                if len(changes) == 1:
                    (floor,) = self._run(self._floor, x_t, t, base, condition)
        return BatchScores(self.points.stack(changes), floor, torch.stack(silent).any(0))

    def _run(self, compute: Callable, *inputs) -> tuple[torch.Tensor, ...]:
        """Return compute(*inputs), replayed if programs are captured."""
        if self._programs is None:
            return compute(*inputs)
        key = compute.__name__, inputs[0].shape, inputs[-1].layout
        if key not in self._programs:
            self._programs.capture(key, compute, *inputs)
        return self._programs(key, *inputs)

    def _ablate(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        check_rows: bool = False,
        trace: Trace | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the changes (V - 1, C), the whole model's velocity (C, T, M) fp32, and whether it is zero (C,)."""

        def run(variants: int) -> torch.Tensor:
            return self.model(x_t.repeat(variants, 1, 1), t, condition).v

        options = self._gating | {"check_rows": check_rows, "trace": trace}
        changes, base = self.variants.changes(run, self.blocks, condition.lengths, **options)
        return changes, base.float(), ~base.flatten(1).any(1)

    def _floor(
        self, x_t: torch.Tensor, t: torch.Tensor, base: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor]:
        """Return the change (C,) of `base`, computed among the variants, against the model as it is."""
        v = self.model(x_t, t, condition).v.float()
        return (velocity_change(v[None], base, condition.lengths)[0],)

    def _check_calls(self, batch: ProbeBatch, condition: Condition) -> None:
        """Raises ValueError if a model that does not say how its layers are called is gated otherwise than its plain
        forward shows. Costs a checked forward of all variants, and one more."""
        x_t, t, name = batch.mel, clip_times(batch, 0.5), type(self.model).__name__
        naming = {option: self._gating[option] for option in ("kind", "state")}
        trace, _ = trace_calls(lambda: self.model(x_t, t, condition), self.blocks, len(x_t), **naming)
        checked = self._ablate(x_t, t, condition, trace=trace)[0]
        remedy = f"{name}: which arguments of its blocks are rows cannot be told: set {name}.row_arguments and state"
        try:
            changes = self._ablate(x_t, t, condition)[0]
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{remedy} ({error})") from error
        limit = rounding_limit(next(self.model.parameters()).dtype)
        if not torch.allclose(changes, checked, rtol=limit, atol=limit, equal_nan=True):
            raise ValueError(remedy)

    def check_blocks(self, batch: ProbeBatch) -> None:
        """Raises ValueError naming a block whose rows depend on each other, or whose arguments cannot be told apart.
        Costs a forward of all variants or a few; call it before a run, and when the floor is high."""
        with evaluation_mode(self.model), torch.no_grad():
            if not self._is_known:
                self._check_calls(batch, batch.condition)
            self._ablate(batch.mel, clip_times(batch, 0.5), batch.condition, check_rows=True)


def foga(
    model: Backbone,
    batch: ProbeBatch,
    *,
    times: Sequence[float] = TIMES,
    draws: int = 1,
    gates: torch.Tensor | None = None,
    sigma: float = 0.5,
    recipe: str = "corrected",
    kind: str = "block",
) -> LayerScores:
    """Return the scores of all layers of a backbone, in L(L+1)/2 block forwards per time and draw.

    The model is evaluated at noised x_t, in evaluation mode, with the same noise for every variant. gates (V, L), first
    row all ones, replaces the single ablations; `values` then has V - 1 rows. kind "branch": the branches of
    every layer apart. sigma: scale of the noise. For other models: ablate.

    recipe "official" is the release's, faults included: the clean mel as x_t at t = 0.8, odd layers only (the others
    are nan), one forward per layer, in training mode, so that dropout differs between them.

    The modes of all modules and the random state are as before afterwards, also when it raises. Raises ValueError when
    the first row of gates ablates something, a velocity is zero or not finite, or a block's rows depend on each other.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: {' or '.join(RECIPES)}")
    if recipe == "official":
        return official_foga(model, batch)
    probe = FogaProbe(model, ProbePoints(tuple(times), draws, sigma), gates=gates, kind=kind)
    names = part_names(model, kind) if gates is None else ()
    scores = probe.launch(batch).of_clips(batch.places, batch.domain, probe.points.times, names=names)
    try:
        check_floor(scores.floor, next(model.parameters()).dtype)
    except ValueError:
        probe.check_blocks(batch)  # names the block, if it is one of them
        raise
    return scores
