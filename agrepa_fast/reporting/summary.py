"""The end of a run: plots, wavs, summary.json and report.html."""

import json
import os
import platform
import statistics
import time

import torch

from ..audio.vocoder import Vocoder
from ..data.batch import Batch
from ..files import write_atomically
from ..kernels import active_backend
from ..probing.fixed_clips import FixedClips
from ..probing.validation import validation_loss
from ..ranks import all_sum, on_rank_0
from ..training.metrics import read_metrics
from ..training.run import Run
from ..zero.ds_config import precision
from .loss_plot import plot_loss
from .plots import plot_all
from .report import write_report
from .samples import sample_clips, write_samples


def finish(run: Run, validation_clips: FixedClips, vocoder: Vocoder | None) -> None:
    """Measure the layers and the averaged weights after the last step, and write plots, wavs, summary.json and
    report.html. Every rank must call it; rank 0, which has the vocoder, writes."""
    config, index, shows = run.config, run.context.index, run.context.rank == 0
    with run.timed("probe"):
        evidence = run.choice.finish(config.train.steps)
    with run.ema.applied():
        with run.timed("validation"):
            averaged = validation_loss(run.engine.module, validation_clips, progress=shows)
        with run.timed("samples"):
            sampled = sample_clips(run.engine.module, index, config, 1, run.device, progress=shows)
    clips = all_sum(torch.tensor([run.metrics.clips], dtype=torch.float64, device=run.device)).item()
    on_rank_0(lambda: _write(run, vocoder, evidence, averaged, sampled, clips))


def _write(
    run: Run,
    vocoder: Vocoder,
    evidence: dict[str, dict],
    averaged: dict[str, float],
    sampled: tuple[Batch, torch.Tensor],
    clips: float,
) -> None:
    """Write what `finish` has measured. clips: that all ranks have trained on."""
    config, index, folder = run.config, run.context.index, run.context.folder
    selection, (batch, mels) = run.choice.aligner.selection, sampled
    with run.timed("samples"):
        wavs = write_samples(batch, mels, index, vocoder, folder / "samples", folder / "plots" / "mel.png")
    correlations = plot_all(folder / "attribution.csv", evidence, selection, folder / "plots", config.align.k)
    plot_loss(folder / "metrics.jsonl", folder / "plots" / "loss.png", selection.step if selection else None)
    if selection:
        selection.save(folder / "selection.json")
    series = read_metrics(folder / "metrics.jsonl")
    losses = {
        "first": series["val/flow_loss"][0][1],
        "last": series["val/flow_loss"][-1][1],
        "ema": averaged["val/flow_loss"],
    }
    summary = {
        "preset": config.run.preset,
        "recipe": "corrected",
        "steps": config.train.steps,
        "val/flow_loss": losses,
        "val/flow_loss_by_domain": {domain: averaged[f"val/flow_loss_{domain}"] for domain in index.domains},
        "val/flow_loss_by_time": {f"{time:g}": averaged[f"val/flow_loss_t{time:g}"] for time in config.eval.times},
        "strategy": config.align.strategy,
        "selection": selection.describe() if selection else None,
        "selection_warning": selection.warning if selection else None,
        "store_contribute_rank_correlation": correlations,
        "clips_per_s": clips / run.seconds["train"] if clips else None,
        "clips_per_s_median": statistics.median(value for _, value in series["train/clips_per_s"]),
        "seconds_since_step": run.metrics.first_step,  # above 0: those of a run before it was resumed are not counted
        "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
        "seconds_total": round(time.perf_counter() - run.started, 1),
        "ranks": run.context.world,
        "zero_stage": run.engine.zero_optimization_stage(),
        "precision": precision(config.train, run.device),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "backend": active_backend(),
        "vocoder": vocoder.name,
        "samples": wavs,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    run.metrics.print(
        f"validation flow loss {losses['first']:.3f} -> {losses['last']:.3f} (EMA {losses['ema']:.3f}); "
        f"look at and listen to {write_report(folder)} ({vocoder.name})"
    )
