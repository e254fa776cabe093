"""Runs inside one process (or one process a rank), many after the other: what train.py builds, for tests that look at
a step from within. Starting a process takes as long as a hundred steps."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.attribution.selection import LayerSelection
from agrepa_fast.config import PRESETS
from agrepa_fast.config_file import load_config
from agrepa_fast.data.index import load_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.probing.schedule import LayerChoice
from agrepa_fast.training.builder import build_model, fit_to_shards
from agrepa_fast.training.context import RunContext
from agrepa_fast.training.metrics import Metrics
from agrepa_fast.training.run import Run
from agrepa_fast.zero.ds_config import resolve_ds_config
from agrepa_fast.zero.ema import Ema
from agrepa_fast.zero.engine import build_engine
from agrepa_fast.zero.masters import masters

CPU = torch.device("cpu")


def ds_values(stage: int, offload: bool = False) -> dict:
    """A preset; stage 3 without the threshold below which small parameters stay whole."""
    values = json.loads((PRESETS / f"zero{stage}{'_offload' if offload else ''}.json").read_text())
    if stage == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return values


def make_run(preset: str, values: dict, folder: Path, *overrides: str):
    """(Run, its endless batches): aligned to L1 and L3 from the first step. The process group must be there."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = load_config(preset, ["align.strategy=fixed:1,3", *overrides])
    index = load_index(config.data.path)
    config = fit_to_shards(config, index)
    layout = BatchLayout(config.train.batch_clips, config.train.accumulation, rank, world)
    ds_config = resolve_ds_config(values, config.train, layout, CPU)
    engine = build_engine(build_model(config, index, ds_config, False), config, ds_config)
    aligner = Aligner(config, engine.module, {domain: index.teacher(domain).dim for domain in index.domains}, CPU)
    layers, weights = dict.fromkeys(index.domains, (1, 3)), dict.fromkeys(index.domains, (0.5, 0.5))
    aligner.select(LayerSelection("fixed:1,3", layers, weights))
    metrics = Metrics(folder, rank, world)
    choice = LayerChoice(config, engine.module, aligner, None, None, metrics.print)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(RunContext(config, index, CPU, rank, world, folder), engine, Ema(engine, 0.5), choice, metrics)
    engine.module.train()
    targets = {"teacher_frames": aligner.objective.target == "frames", "attention": aligner.objective.attention}
    return run, TrainBatches(index, config.data, layout, seed=0, center=True, **targets)


def state(run: Run) -> dict[str, torch.Tensor]:
    """Copies of all that a step changes: weights, moments, averages, heads and theirs."""
    found = {f"weights{i}": part for i, part in enumerate(masters(run.engine))}
    found |= {f"average{i}": part for i, part in enumerate(run.ema.average)}
    found |= {f"head{i}": p.detach() for i, p in enumerate(run.choice.aligner.parameters())}
    for name, optimizer in (("adam", run.engine.basic_optimizer), ("heads", run.choice.aligner.optimizer)):
        for i, moments in enumerate(optimizer.state.values()):
            found |= {f"{name}{i}.{part}": torch.as_tensor(value) for part, value in moments.items()}
    return {name: tensor.clone() for name, tensor in found.items()}
