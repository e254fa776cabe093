"""One rank's part of a run: the optimizer step and validation."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..config import Config
from ..data.batch import Batch
from ..data.index import Index
from ..errors import LocalError, UserError
from ..flow import flow_loss, reference_prefix, training_draws
from ..kernels import flow_mix
from ..lr_schedule import lr_factor
from ..probing.fixed_clips import FixedClips
from ..probing.schedule import LayerChoice
from ..probing.validation import validation_loss
from ..seeds import clip_keys
from ..zero.ema import Ema
from ..zero.gradients import gradient_norms, make_gradient_nan
from ..zero.update_ratio import update_ratio
from .captured_step import GraphedLosses, Losses
from .faultlog import FaultLog
from .flops import step_flops
from .metrics import Metrics
from .nonfinite import SkipGuard, guarded
from .profile import ProfileWindow


@dataclass
class Run:
    """One rank's part of a run."""

    config: Config
    index: Index
    device: torch.device
    engine: object
    ema: Ema
    choice: LayerChoice
    metrics: Metrics
    rank: int
    world: int
    folder: Path
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        train = self.config.train
        self.guard = SkipGuard(self.engine, self.metrics, self.folder, train.max_skipped)
        self.profile = ProfileWindow(train.profile, self.folder, self.rank)
        self.graphs = GraphedLosses(self._trained, train.graphs, self.metrics.say) if train.graphs else None
        self.faults = FaultLog(self.index, self.config.data.max_faults, self.metrics, self.folder, self.device)

    @contextmanager
    def timed(self, stage: str):
        """Wall time of a stage for the summary; it does not count as training time."""
        start = time.perf_counter()
        with self.metrics.pause():
            yield
        self.seconds[stage] += time.perf_counter() - start

    def micro_step(self, batch: Batch, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Forward and backward of one micro-batch, and after the last of a step the update of the model; every draw
        depends on (seed, step, place in the global batch). The losses, and each clip's flow loss (B,)."""
        batch, seed, aligner = batch.to(self.device), self.config.run.seed, self.choice.aligner
        keys = torch.stack([clip_keys(seed, step, batch.places, use) for use in ("draws", "noise")]).to(self.device)
        if self.graphs is None:
            losses, clips = self.losses(self.engine, batch, keys, step)
            total = sum(losses.values())
        else:
            compute = partial(self.losses, self.engine.module, step=step)
            total, losses, clips = self.graphs(compute, batch, keys, aligner.layers(step))
        self.engine.backward(guarded(batch.weight * total))
        if self.engine.is_gradient_accumulation_boundary():
            self.choice.watch(lambda: gradient_norms(self.engine, self.engine.module.blocks), step)
            make_gradient_nan(self.engine, unless_finite=aligner.reduce())
        self.engine.step()
        return {name: batch.weight * loss.detach() for name, loss in losses.items()}, clips.detach()

    def losses(self, model, batch: Batch, keys: torch.Tensor, step: int) -> tuple[Losses, torch.Tensor]:
        """Means over the micro-batch, and each clip's flow loss (B,). keys (2, B): of the clips' draws and noise."""
        flow, aligner = self.config.flow, self.choice.aligner
        draws = training_draws(flow, batch.condition.lengths, keys[0])
        condition = replace(
            batch.condition,
            reference=reference_prefix(batch.mel, draws.reference_lengths),
            keep_tokens=draws.keep_tokens,
            keep_reference=draws.keep_reference,
        )
        x_t, target = flow_mix(batch.mel, draws.t, keys[1], flow.sigma)
        out = model(x_t, draws.t, condition, capture=aligner.layers(step), pooled=True)
        losses = aligner.losses(out.hidden, batch, draws.t, draws.keep_tokens, step)
        clips = flow_loss(out.v, target, batch.condition.lengths)
        losses["flow_loss"] = clips.mean()
        return losses, clips

    def _trained(self) -> list[torch.nn.Parameter]:
        return [*self.engine.module.parameters(), *self.choice.aligner.parameters()]

    def step(self, batches, step: int) -> None:
        """One optimizer step over the global batch, left out by all ranks when it is not finite."""
        accumulation = self.config.train.accumulation
        sums: dict[str, torch.Tensor] = {}
        clips: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self.profile.begin(step + 1)
        for _ in range(accumulation):
            batch = self._next(batches)
            self.faults.note(batch.faults)
            losses, clip_losses = self.micro_step(batch, step)
            clips.append((batch.keys, clip_losses))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value / accumulation
        if self.guard.skipped(step, clips):
            self.choice.aligner.discard()
            self.metrics.skip()
        else:
            self.choice.aligner.step(step)
            self.ema.update()
            sums["loss"] = sum(sums.values())
            sums["grad_norm"] = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
            self.metrics.add(**sums)
        self.profile.end(step + 1)

    def log(self, done: int) -> None:
        """Write the numbers of the steps since the last call, the latest being step `done` (counted from 1), and what
        could not be read. Raises UserError when that is more than data.max_faults."""
        train, ratio = self.config.train, 0.0  # nothing was updated by a step that was skipped
        if not self.guard.in_row:
            ratio = update_ratio(self.engine, train.lr * lr_factor(train, done - 1)).item()
        self.metrics.flush(done, self.device, lr=self.engine.get_lr()[0], update_ratio=ratio)
        self.faults.flush(done)

    def close(self) -> None:
        self.profile.close()
        self.metrics.close()

    def validate(self, clips: FixedClips, step: int) -> dict[str, float]:
        with self.timed("validation"):
            values = validation_loss(self.engine.module, clips, self.config, progress=self.rank == 0)
            self.metrics.write(step, values)
        self.metrics.say(f"step {step}: validation flow loss {values['val/flow_loss']:.4f}")
        return values

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, counted. A fault in the shards is this rank's alone; from a loader process it comes inside a
        traceback."""
        start = time.perf_counter()
        try:
            batch = next(batches)
        except UserError as error:
            raise LocalError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from error
        wait = time.perf_counter() - start
        lengths = batch.condition.lengths.tolist()  # still on the host
        flops = step_flops(self.config.model, lengths)
        self.metrics.count(clips=len(lengths), frames=sum(lengths), flops=flops, wait=wait)
        return batch
