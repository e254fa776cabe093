"""One rank's part of a run: the optimizer step, validation, and the probe that chooses the layers."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..attribution.report import append_csv, plot_attribution
from ..attribution.scores import LayerScores
from ..attribution.selection import NotRankableError, select_layers
from ..config import Config, UserError
from ..data.shards import Index
from ..data.stream import Batch
from ..flow import clip_keys, flow_loss, reference_prefix, training_draws
from ..kernels import flow_mix
from .aligner import Aligner
from .ema import Ema
from .engine import LocalError
from .measure import FixedClips, probe, validation_loss
from .metrics import Metrics


@dataclass
class Run:
    """One rank's part of a run."""

    config: Config
    index: Index
    device: torch.device
    engine: object
    ema: Ema
    aligner: Aligner
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
        out = self.engine(x_t, draws.t, condition, capture=self.aligner.layers, pooled=True)
        flow_part = flow_loss(out.v, target, batch.condition.lengths).mean()
        align_part = self.aligner.loss(out.hidden, batch)
        self.engine.backward(flow_part + align_part)
        self.engine.step()
        return {"flow_loss": flow_part.detach(), "align_loss": align_part.detach()}

    def step(self, batches, step: int) -> None:
        """One optimizer step over the global batch."""
        accumulation = self.config.train.accumulation
        sums: dict[str, torch.Tensor] = {}
        for _ in range(accumulation):
            for name, value in self.micro_step(_next(batches), step).items():
                sums[name] = sums.get(name, 0) + value / accumulation
        self.aligner.step(step)
        self.ema.update()
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            sums["grad_norm"] = torch.as_tensor(norm, device=self.device)
        self.metrics.add(loss=sums["flow_loss"] + sums["align_loss"], **sums)

    def validate(self, clips: FixedClips, step: int) -> dict[str, float]:
        with self.timed("validation"):
            values = validation_loss(self.engine.module, clips, self.config, progress=self.rank == 0)
            self.metrics.write(step, values)
        self.metrics.say(f"step {step}: validation flow loss {values['val/flow_loss']:.4f}")
        return values

    def measure_layers(self, clips: FixedClips, step: int) -> LayerScores:
        with self.timed("probe"):
            scores = probe(self.engine.module, clips, self.config, step, progress=self.rank == 0)
            if self.rank == 0:
                append_csv(self.folder / "attribution.csv", scores, step)
        return scores

    def choose_layers(self, clips: FixedClips, step: int) -> None:
        """Probe when it is due, and align the layers that stand out: at the end of the warm-up, or before it once their
        choice is probe.confidence sure. A probe that fails costs its time and nothing else."""
        schedule, align = self.config.probe, self.config.align
        if align.strategy != "foga" or self.aligner.selection is not None or step < schedule.start_step:
            return
        if step % schedule.every and step != schedule.warmup_steps:
            return
        try:
            scores = self.aligner.add_probe(self.measure_layers(clips, step))
            selection = select_layers(scores, align.k, align.weighting)
        except NotRankableError as refusal:
            self.metrics.say(f"step {step}: FoG-A does not rank yet: {refusal}")
            return
        except (ValueError, torch.OutOfMemoryError) as failure:
            self.metrics.say(f"step {step}: the probe failed and training goes on: {failure}")
            return
        sure = min(measured["top_k_probability"] for measured in selection.evidence.values())
        found = f"{selection.describe()} (Top-{align.k} with probability {sure:.2f})"
        early = step < schedule.warmup_steps
        if early and sure <= schedule.confidence:
            self.metrics.say(f"step {step}: FoG-A leads with {found}")
            return
        self.aligner.select(selection)
        if self.rank == 0:
            selection.save(self.folder / "selection.json")
            plot_attribution(selection.evidence, selection, self.folder / "plots" / "attribution.png")
        saved = -(-(schedule.warmup_steps - step) // schedule.every) if early else 0
        self.metrics.say(
            f"step {step}: aligned from here on: {found}" + (f"; decided early, {saved} probes saved" if early else "")
        )


def _next(batches: Iterator[Batch]) -> Batch:
    """The next batch. A fault in the shards is this rank's alone; from a loader process it comes inside a traceback."""
    try:
        return next(batches)
    except UserError as error:
        raise LocalError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from error
