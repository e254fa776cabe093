"""The optimizer step of a run, on one rank."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..data.batch import Batch
from ..device import GRAPHS, SideStream, tensors_of, to_device
from ..errors import UserError
from ..flow import counted_frames, expected_frames, training_loss
from ..kernels import flow_mix
from ..lr_schedule import lr_factor
from ..probing.fixed_clips import FixedClips
from ..probing.schedule import LayerChoice
from ..probing.validation import validation_loss
from ..seeds import clip_keys
from ..zero.ema import Ema
from ..zero.engine import announce_backward
from ..zero.gradients import gradient_norms, make_gradient_nan
from ..zero.masters import trained_parameters
from ..zero.update_ratio import update_ratio
from .captured_step import GraphedLosses, Losses
from .context import RunContext
from .draws import averaged_states, draw_condition
from .flops import flop_counter
from .lost_clips import LostClips
from .metrics import Metrics
from .nonfinite import NonFiniteSteps, nan_gradient_unless_finite
from .profile import ProfileWindow


@dataclass
class Run:
    """One rank's part of a run: the optimizer step, validation, and the time that each stage takes."""

    context: RunContext
    engine: object
    ema: Ema
    choice: LayerChoice
    metrics: Metrics
    started: float = field(default_factory=time.perf_counter)  # when the command began to build it
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by stage
    auto_graphs: int = 0  # train.graphs where that is null: count_shapes

    def __post_init__(self) -> None:
        self.config, self.device = self.context.config, self.context.device
        self.graphs = self._captured_losses()
        self._copies = SideStream(self.device)
        self.flops = flop_counter(self.engine.module, self.context)
        self.nonfinite = NonFiniteSteps(self.context, self.engine, self.metrics)
        self.lost_clips = LostClips(self.context, self.metrics)
        self.profile = ProfileWindow(self.context)

    @contextmanager
    def timed(self, stage: str):
        """Add the wall time inside to the stage's. It does not count as training time."""
        start = time.perf_counter()
        with self.metrics.pause():
            yield
        self.seconds[stage] += time.perf_counter() - start

    @contextmanager
    def training_time(self):
        """Add the wall time inside, without that of the stages timed inside, to stage "train"."""
        start, others = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds["train"] += time.perf_counter() - start - (sum(self.seconds.values()) - others)

    def micro_step(self, batch: Batch, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Forward and backward of one micro-batch, and after the last of a step the update of the model. Returns the
        losses, and each clip's flow loss (B,). Every draw depends on (seed, step, place in the global batch)."""
        aligner = self.choice.aligner
        batch, keys = self._to_device(batch, step)
        aligner.begin(step)
        if layers := aligner.averaged_layers(step):
            given = self.config.flow, batch, keys, layers
            batch = replace(batch, averaged=averaged_states(self.engine.module, self.ema, *given))
        if self.graphs is None:
            losses, clips = self.losses(self.engine, batch, keys, step)
            total = sum(losses.values())
        else:
            compute = partial(self.losses, self.engine.module, step=step)
            total, losses, clips = self.graphs(compute, batch, keys, aligner.variant(step))
            announce_backward(self.engine)
        self.engine.backward(nan_gradient_unless_finite(batch.weight * total))
        if self.engine.is_gradient_accumulation_boundary():
            self.choice.keep_gradient_norms(lambda: gradient_norms(self.engine, self.engine.module.layers), step)
            make_gradient_nan(self.engine, unless_finite=aligner.reduce(step))
        self.engine.step()
        return {name: batch.weight * loss.detach() for name, loss in losses.items()}, clips.detach()

    def _captured_losses(self) -> GraphedLosses | None:
        wanted, rank = self.config.train.graphs, self.context.rank
        limit = self.auto_graphs if wanted is None else wanted
        if not limit:
            return None
        survive = None if wanted else lambda line: print(f"rank {rank}: {line}", flush=True)
        return GraphedLosses(self._trained, limit, self.metrics.print, survive)

    def _to_device(self, batch: Batch, step: int) -> tuple[Batch, torch.Tensor]:
        """Return the batch and the keys (2, B) of its draws on the device. A GPU copies them beside its work: the
        optimizer of the step before, by which the host runs ahead of it."""
        keys = torch.stack([clip_keys(self.context.draws_seed, step, batch.places, use) for use in ("draws", "noise")])
        copies = self._copies.run(lambda: (batch.to(self.device), to_device(keys, self.device)), after_queued=False)
        self._copies.join(tensors_of(*copies))
        return copies

    def losses(self, model, batch: Batch, keys: torch.Tensor, step: int) -> tuple[Losses, torch.Tensor]:
        """Return the losses, means over the micro-batch, and each clip's flow loss (B,). keys (2, B): of the draws and
        the noise of each clip."""
        flow, aligner = self.config.flow, self.choice.aligner
        draws, condition = draw_condition(flow, batch, keys[0])
        x_t, target = flow_mix(batch.mel, draws.t, keys[1], flow.sigma)
        taps = {"capture": aligner.layers(step), "pooled": aligner.pools(step)}
        out = model(x_t, draws.t, condition, **taps, attention=aligner.attention_layers(step))
        losses = aligner.losses(out.hidden, batch, draws.t, draws.keep_tokens, step, out.attention)
        counted = counted_frames(flow, draws.hidden, batch.condition.lengths)
        clips = training_loss(flow, out.v, target, counted, draws.t)
        weighted = clips
        if flow.average == "frame":
            weighted = clips * (counted.end - counted.start) / expected_frames(flow, batch.mean_frames)
        losses["flow_loss"] = weighted.mean()
        return losses, clips

    def step(self, batches, step: int) -> None:
        """Take one optimizer step over the global batch; all ranks leave it out if it is not finite. step: from 0."""
        accumulation = self.config.train.accumulation
        sums: dict[str, torch.Tensor] = {}
        clips: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self.profile.before_step(step + 1)
        for _ in range(accumulation):
            batch = self._next(batches)
            self.lost_clips.add(batch.faults)
            losses, clip_losses = self.micro_step(batch, step)
            clips.append((batch.keys, clip_losses))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value / accumulation
        if self.nonfinite.skipped(step, clips):
            self.choice.aligner.discard()
            self.metrics.skip()
        else:
            self.choice.aligner.step(step)
            self.ema.update()
            sums["loss"] = sum(sums.values())
            sums["grad_norm"] = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
            self.metrics.add(**sums)
        self.profile.after_step(step + 1)

    def log(self, done: int) -> None:
        """Write the numbers of the steps since the last call, up to step `done` (counted from 1), and the clips that
        could not be read. Raises UserError if more than data.max_faults of them are lost."""
        train, ratio = self.config.train, 0.0  # a step that was skipped has updated nothing
        if not self.nonfinite.in_row:
            ratio = update_ratio(self.engine, train.lr * lr_factor(train, done - 1)).item()
        self.metrics.flush(done, self.device, lr=self.engine.get_lr()[0], update_ratio=ratio)
        self.lost_clips.report(done)

    def validate(self, clips: FixedClips, step: int) -> float:
        """Write the validation losses after so many steps, and return the flow loss over all clips."""
        with self.timed("validation"):
            values = validation_loss(self.engine.module, clips, progress=self.context.rank == 0)
            self.metrics.write(step, values)
        self.metrics.print(f"step {step}: validation flow loss {values['val/flow_loss']:.4f}")
        return values["val/flow_loss"]

    def close(self) -> None:
        """Finish the files of metrics and of a trace that is under way."""
        self.profile.close()
        if GRAPHS["captured"]:
            self.metrics.print(f"CUDA graphs: {GRAPHS['captured']} captured, {GRAPHS['replayed']} replays")
        self.metrics.close()

    def _trained(self) -> list[torch.nn.Parameter]:
        trained = (parameter for _, parameter in trained_parameters(self.engine.module))
        return [*trained, *self.choice.aligner.parameters()]

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, counted. Raises UserError for a fault in the shards, which this rank alone sees."""
        start = time.perf_counter()
        try:
            batch = next(batches)
        except UserError as error:
            raise UserError(str(error)) from error
        wait = time.perf_counter() - start
        lengths = batch.condition.lengths.tolist()  # still on the host
        self.metrics.count_batch(clips=len(lengths), frames=sum(lengths), flops=self.flops(lengths), wait=wait)
        return batch
