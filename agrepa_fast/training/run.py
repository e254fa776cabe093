"""One rank's part of a run: the optimizer step and validation."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..config import Config, UserError
from ..data.shards import Index
from ..data.stream import Batch
from ..flow import clip_keys, flow_loss, reference_prefix, training_draws
from ..kernels import flow_mix
from .choose import LayerChoice
from .ema import Ema
from .engine import LocalError
from .measure import FixedClips, validation_loss
from .metrics import Metrics


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

    @contextmanager
    def timed(self, stage: str):
        """Wall time of a stage for the summary; it does not count as training time."""
        start = time.perf_counter()
        with self.metrics.pause():
            yield
        self.seconds[stage] += time.perf_counter() - start

    def micro_step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """Forward and backward of one micro-batch; every draw depends on (seed, step, place in the global batch)."""
        flow, seed = self.config.flow, self.config.run.seed
        batch = batch.to(self.device)
        keys = clip_keys(seed, step, batch.places, "draws").to(self.device)
        draws = training_draws(flow, batch.condition.lengths, keys)
        condition = replace(
            batch.condition,
            reference=reference_prefix(batch.mel, draws.reference_lengths),
            keep_tokens=draws.keep_tokens,
            keep_reference=draws.keep_reference,
        )
        noise_keys = clip_keys(seed, step, batch.places, "noise").to(self.device)
        x_t, target = flow_mix(batch.mel, draws.t, noise_keys, flow.sigma)
        aligner = self.choice.aligner
        out = self.engine(x_t, draws.t, condition, capture=aligner.layers(step), pooled=True)
        losses = aligner.losses(out.hidden, batch, draws.t, draws.keep_tokens, step)
        losses["flow_loss"] = flow_loss(out.v, target, batch.condition.lengths).mean()
        self.engine.backward(sum(losses.values()))
        if self.engine.is_gradient_accumulation_boundary():
            self.choice.watch(self.engine, step)
        self.engine.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, batches, step: int) -> None:
        """One optimizer step over the global batch."""
        accumulation = self.config.train.accumulation
        sums: dict[str, torch.Tensor] = {}
        for _ in range(accumulation):
            for name, value in self.micro_step(_next(batches), step).items():
                sums[name] = sums.get(name, 0) + value / accumulation
        self.choice.aligner.step(step)
        self.ema.update()
        sums["loss"] = sum(sums.values())
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            sums["grad_norm"] = torch.as_tensor(norm, device=self.device)
        self.metrics.add(**sums)

    def validate(self, clips: FixedClips, step: int) -> dict[str, float]:
        with self.timed("validation"):
            values = validation_loss(self.engine.module, clips, self.config, progress=self.rank == 0)
            self.metrics.write(step, values)
        self.metrics.say(f"step {step}: validation flow loss {values['val/flow_loss']:.4f}")
        return values


def _next(batches: Iterator[Batch]) -> Batch:
    """The next batch. A fault in the shards is this rank's alone; from a loader process it comes inside a traceback."""
    try:
        return next(batches)
    except UserError as error:
        raise LocalError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from error
