"""What a person sees at the end of a run: plots, wavs and summary.json."""

import json
import os
import platform
import time

import torch

from ..audio.vocoder import Vocoder
from ..files import write_atomically
from ..kernels import active_backend
from ..probing.fixed_clips import FixedClips
from ..probing.validation import validation_loss
from ..training.metrics import read_metrics
from ..training.run import Run
from ..zero.ds_config import precision
from .loss import plot_loss
from .plots import plot_all
from .samples import sample_clips, write_samples


def finish(run: Run, val_clips: FixedClips, vocoder: Vocoder | None, started: float) -> None:
    """Plots, wavs and the summary. Every rank runs the model; rank 0, which has the vocoder, writes."""
    config, folder = run.config, run.folder
    with run.timed("probe"):
        evidence = run.choice.finish(config.train.steps)
    selection = run.choice.aligner.selection
    with run.ema.applied():
        with run.timed("validation"):
            averaged = validation_loss(run.engine.module, val_clips, config, progress=run.rank == 0)
        with run.timed("samples"):
            batch, sampled = sample_clips(run.engine.module, run.index, config, 1, run.device, progress=run.rank == 0)
    if run.rank != 0:
        return
    with run.timed("samples"):
        wavs = write_samples(batch, sampled, run.index, vocoder, folder / "samples", folder / "plots" / "mel.png")
    dissociation = plot_all(folder / "attribution.csv", evidence, selection, folder / "plots", config.align.k)
    plot_loss(folder / "metrics.jsonl", folder / "plots" / "loss.png", selection.step if selection else None)
    if selection:
        selection.save(folder / "selection.json")
    series = read_metrics(folder / "metrics.jsonl")
    first_loss, last_loss = series["val/flow_loss"][0][1], series["val/flow_loss"][-1][1]
    clips_per_s = [value for _, value in series["train/clips_per_s"]]
    summary = {
        "preset": config.run.preset,
        "recipe": "corrected",
        "steps": config.train.steps,
        "val/flow_loss": {"first": first_loss, "last": last_loss, "ema": averaged["val/flow_loss"]},
        "val/flow_loss_by_domain": {d: averaged[f"val/flow_loss_{d}"] for d in run.index.domains},
        "strategy": config.align.strategy,
        "selection": selection.describe() if selection else None,
        "store_contribute_rank_correlation": dissociation,
        "clips_per_s": sorted(clips_per_s)[len(clips_per_s) // 2],
        "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
        "seconds_total": round(time.perf_counter() - started, 1),
        "ranks": run.world,
        "zero_stage": run.engine.zero_optimization_stage(),
        "precision": precision(config.train, run.device),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "backend": active_backend(),
        "vocoder": vocoder.name,
        "samples": wavs,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    run.metrics.say(
        f"validation flow loss {first_loss:.3f} -> {last_loss:.3f} (EMA {averaged['val/flow_loss']:.3f}); "
        f"look at {folder}/plots and listen to {folder}/samples ({vocoder.name})"
    )
