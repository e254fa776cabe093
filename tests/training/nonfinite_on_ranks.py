"""Steps that are not finite on the last rank alone, for test_nonfinite.py."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from agrepa_fast.errors import UserError
from agrepa_fast.lr_schedule import lr_factor

from .in_process import ds_values, make_run, state

BAD = 1  # the step (from 0) that is spoilt
CASES = {  # ranks -> stage, offload, precision, what is spoilt
    1: [
        (0, False, "fp32", "mel"),
        (3, False, "bf16", "mel"),
        (1, False, "fp32", "loss"),
        (2, True, "fp32", "head"),
    ],
    2: [
        *((stage, False, precision, "mel") for stage in range(4) for precision in ("fp32", "bf16")),
        *((stage, True, "fp32", "mel") for stage in (2, 3)),
        *((stage, stage == 3, "fp32", "head") for stage in (0, 1, 3)),
        (3, False, "bf16", "head"),
        (0, False, "fp32", "loss"),
    ],
}


class Spoilt:
    """Batches whose first clip has a NaN in the second micro-batch of a step, on the last rank."""

    def __init__(self, batches, micro: int):
        self.batches, self.micro, self.given = batches, micro, -1

    def __iter__(self):
        return self

    def __next__(self):
        batch, self.given = next(self.batches), self.given + 1
        if self.given == self.micro and dist.get_rank() == dist.get_world_size() - 1:
            mel = batch.mel.clone()
            mel[0, 2, 1] = float("nan")
            batch = replace(batch, mel=mel)
        return batch


@contextmanager
def head_gradient(aligner):
    """A head's gradient that is not finite, while the model's own is."""
    handle = next(iter(aligner.heads.heads.parameters())).register_hook(lambda gradient: gradient * float("inf"))
    yield
    handle.remove()


@contextmanager
def loss_alone(aligner):
    """A loss that overflows, while its gradient does not."""
    losses = aligner.losses
    aligner.losses = lambda *given: {**losses(*given), "more": torch.tensor(float("inf"))}
    yield
    aligner.losses = losses


PLANTS = {"mel": lambda aligner: nullcontext(), "head": head_gradient, "loss": loss_alone}


def skipped_step(preset: str, folder: Path, stage: int, offload: bool, precision: str, plant: str) -> dict:
    """What a spoilt step did: names of what changed, the learning rate's error, losses of the steps around."""
    overrides = (f"train.precision={precision}", "train.accumulation=2")
    run, batches = make_run(preset, ds_values(stage, offload), folder, *overrides)
    if plant == "mel":
        batches = Spoilt(batches, 2 * BAD + 1)
    written, changed, moved = [], [], []
    for step in range(3):
        before = state(run)
        spoils = step == BAD and dist.get_rank() == dist.get_world_size() - 1
        with PLANTS[plant](run.choice.aligner) if spoils else nullcontext():
            run.step(batches, step)
        after = state(run)
        assert before.keys() == after.keys() or step == 0  # moments come with the first step
        differ = [name for name in before if not torch.equal(before[name], after[name])]
        (changed if step == BAD else moved).append(differ)
        written.append(run.metrics.flush(step + 1))
        assert all(value.isfinite().all() for value in after.values()), step
    rate = run.engine.get_lr()[0] / run.config.train.lr - lr_factor(run.config.train, 3)
    return {"changed": changed[0], "moved": [len(names) for names in moved], "rate": rate, "metrics": written}


def stopped(preset: str, folder: Path) -> str:
    run, batches = make_run(preset, ds_values(2), folder, "train.max_skipped=2")
    batches = Spoilt(batches, 0)
    run.step(batches, 0)
    batches.micro = 1
    try:
        run.step(batches, 1)
    except UserError as error:
        return str(error)
    return "went on"


def spoil_steps(preset: str, folder: Path) -> dict:
    """What this rank saw: of every case of CASES, and what a run says that is stopped."""
    found = {}
    for case in CASES[dist.get_world_size()]:
        name = "-".join(map(str, case))
        found[name] = skipped_step(preset, folder / name, *case)
    return found | {"stopped": stopped(preset, folder / "stopped")}
