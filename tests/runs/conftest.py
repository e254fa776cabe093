"""Checkpoints that several tests of runs look at."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agrepa_fast.checkpoints import load
from agrepa_fast.checkpoints import save as checkpoint
from agrepa_fast.config import Config
from agrepa_fast.config_file import save_config
from agrepa_fast.data.index import load_index

from ..ranks import run_training


@pytest.fixture(scope="session")
def saved(preset, tmp_path_factory) -> Path:
    """Two ranks, stage 2, saved after steps 3 and 5, copied in the background."""
    folder = tmp_path_factory.mktemp("saved")
    args = ("--ds_config", "zero2.json", "--preset", str(preset), f"run.dir={folder}/run")
    run_training(2, *args, "train.save_every=3", "train.keep=9", f"train.copy_to={folder}/copy", cwd=folder)
    return folder / "run"


@pytest.fixture
def made(preset, tmp_path, monkeypatch):
    """Checkpoints of one rank, without DeepSpeed: `made(keep=…)` returns them and a function that saves a step;
    `made.resume(ours, step)` goes on from one."""
    monkeypatch.setattr(checkpoint.dist, "barrier", lambda: None)
    monkeypatch.setattr(checkpoint, "full_weights", lambda engine: {"weight": torch.ones(3)})
    monkeypatch.setattr(checkpoint, "step_counters", lambda engine: {})
    index, said = load_index(preset.parent), []

    def write(state, path):
        torch.save(state, path)

    def save_checkpoint(where, tag, **_):
        engine.checkpoint_engine.save({"moments": torch.zeros(9)}, Path(where) / tag / "optim_states.pt")

    engine = SimpleNamespace(
        checkpoint_engine=SimpleNamespace(save=write),
        save_checkpoint=save_checkpoint,
        _copy_recovery_script=None,
        bfloat16_enabled=lambda: False,
        zero_optimization_stage=lambda: 2,
        config={},
    )
    ema = SimpleNamespace(applied=nullcontext, updates=3, load=lambda *_: None)
    aligner = SimpleNamespace(selection=None, export=lambda: {"bitc": torch.ones(1)})
    choice = SimpleNamespace(state_dict=dict, load_state_dict=lambda _: None, aligner=aligner)
    for name in ("load_engine", "set_rate"):
        monkeypatch.setattr(load, name, lambda *_: None)

    def make(**train):
        config = Config()
        config = replace(config, train=replace(config.train, **train), run=replace(config.run, id="this"))
        save_config(config, tmp_path / "config.yaml")
        ours = checkpoint.Checkpoints(tmp_path / "checkpoints", 0, 1, config, index, said.append)
        return ours, lambda step, **more: ours.save(engine, ema, choice, step, **{"must_succeed": False} | more)

    make.said = said
    make.resume = lambda ours, step: load.load_checkpoint(ours.folder / f"step{step:08d}", ours, engine, ema, choice)
    return make
