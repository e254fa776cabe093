"""What metrics.jsonl says, against values worked out by hand; the profiler's window; W&B."""

import gzip
import json
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agrepa_fast.config import ModelConfig, TrainConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.index import read_index
from agrepa_fast.errors import UserError
from agrepa_fast.kernels import active_backend
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.training.context import RunContext
from agrepa_fast.training.flops import forward_flops, peak_flops, peak_tflops, step_flops
from agrepa_fast.training.metrics import Metrics, read_metrics
from agrepa_fast.training.tracker import Wandb, check_tracker, open_tracker

from ..ranks import run_training
from ..runs.mine import Mine
from ..testing import metrics, small_batch, small_model, write_small_shards


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's attention kernels are counted, too")
@pytest.mark.parametrize("position", ["rotary_conv", "sinusoidal"])
def test_flops_are_what_torch_counts_and_what_it_overlooks(position):
    model = small_model(depth=3, position=position)
    mel, condition = small_batch((37,))
    with FlopCounterMode(display=False) as counter:
        model(mel, torch.rand(1), condition)
    attention = 3 * 2 * 2 * 37 * 37 * 32
    fused = 3 * 2 * 37 * 32 * 128 * (active_backend() != "reference")  # linear_gelu is an op of ours
    count = condition.tokens.shape[1]
    tokens = 2 * count * 24 * 24 + 2 * 37 * count * 24  # projected and stretched: left out, as step_flops says
    assert step_flops(model.config, [37]) == 3 * (counter.get_total_flops() + attention + fused - tokens)
    assert step_flops(model.config, [37, 20]) == step_flops(model.config, [37]) + step_flops(model.config, [20])


def test_flops_of_the_paper_s_model():
    config = replace(load_config("agrepa-a").model, n_mels=100, vocab=8192)
    assert step_flops(config, [938]) == pytest.approx(1.96e12, rel=0.02)  # 24 blocks, 10 s


def test_flops_of_any_model_are_those_of_three_forwards(tmp_path):
    """AudioDiT's formula, to the parts that it leaves out; and a model without attention."""
    index = read_index(write_small_shards(tmp_path / "shards").parent)
    model = AudioDiT(ModelConfig(dim=32, depth=3, heads=2, token_dim=8, n_mels=index.n_mels, vocab=index.vocab))
    flops = forward_flops(model, index, torch.device("cpu"))
    assert flops.pair == 3 * 2 * 2 * 32 + 2 * 8  # scores and values; as many tokens as frames are stretched to them
    measured = flops.clip + 20 * flops.frame + 400 * flops.pair
    assert 3 * measured == pytest.approx(step_flops(model.config, [20]), rel=0.1)

    blocks = forward_flops(AudioDiT(replace(model.config, depth=40)), index, torch.device("cpu"))
    assert blocks.attention_cost == pytest.approx(model.attention_cost, rel=0.05)  # the ends matter little

    flops = forward_flops(Mine(index.n_mels, index.vocab, dim=16, depth=3), index, torch.device("cpu"))
    assert flops.frame == 2 * (2 * index.n_mels * 16 + 3 * 2 * 16 * 32 + 16 * index.n_mels)
    assert flops.attention_cost == flops.pair == 0


def test_no_mfu_rather_than_a_false_one(monkeypatch):
    assert peak_flops(TrainConfig(), torch.device("cpu")) is None
    assert peak_flops(TrainConfig(peak_tflops=2.5), torch.device("cpu")) == 2.5e12
    names = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA H200": 989.0, "Tesla V100": None}
    for name, peak in {**names, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA L40S": 362.0, "NVIDIA L4": 121.0}.items():
        assert peak_tflops(name) == peak
    for name in ("L40", "RTX A1000", "RTX A4000", "A10G", "RTX A3000 Laptop GPU", "GeForce RTX 4090 Laptop GPU"):
        assert peak_tflops(f"NVIDIA {name}") is None  # another GPU's name is inside
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(TrainConfig(), torch.device("cuda")) == 989e12
    assert peak_flops(TrainConfig(precision="fp32"), torch.device("cuda")) is None


def test_means_and_rates_since_the_last_flush(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    made = Metrics(tmp_path, 0, 1, peak_flops=50.0)
    for loss in (1.0, 4.0):
        made.count_batch(clips=8, frames=100, flops=40.0, wait=0.25)
        made.add(loss=torch.tensor(loss))
    made.count_batch(clips=8, frames=100, flops=40.0, wait=0.5)
    made.skip()
    with made.pause():
        clock[0] += 50
    clock[0] += 4
    values = made.flush(3, lr=0.1)
    wanted = {"loss": 2.5, "clips_per_s": 6.0, "frames_per_s": 75.0, "data_wait": 0.25, "mfu": 0.6, "skipped": 1}
    for name, value in wanted.items():
        assert values[f"train/{name}"] == pytest.approx(value), name
    assert values["train/lr"] == 0.1
    assert 0.1 < values["train/peak_memory_gib"] < 100
    made.skip()
    clock[0] += 1
    values = made.flush(4)
    assert values["train/skipped"] == 1
    assert values["train/clips_per_s"] == 0
    assert "train/loss" not in values


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped.jsonl", "faults.jsonl"])
def test_a_resume_drops_the_lines_of_later_steps(name, tmp_path):
    (tmp_path / name).write_text('{"step": 2}\n{"step": 4}\n')
    resumed = Metrics(tmp_path, 0, 1)
    resumed.open(steps=9, first_step=3)
    resumed.close()
    assert (tmp_path / name).read_text() == '{"step": 2}\n'


def test_a_run_writes_them_and_a_trace_of_the_steps_asked_for(preset, tmp_path):
    settings = ("train.profile=[2,3]", "train.peak_tflops=0.001", "train.steps=4", "align.strategy=none")
    run_training(1, "--ds_config", "zero0.json", "--preset", str(preset), "run.dir=run", *settings, cwd=tmp_path)
    run = tmp_path / "run"
    series = read_metrics(run / "metrics.jsonl")
    for name in ("clips_per_s", "frames_per_s", "mfu", "grad_norm", "update_ratio", "peak_memory_gib"):
        assert all(value > 0 for _, value in series[f"train/{name}"]), name
        assert len(series[f"train/{name}"]) == 4
    assert all(0 <= value < 1 for _, value in series["train/data_wait"])
    assert all(values["train/skipped"] == 0 for step, values in metrics(run).items() if step)
    summary = json.loads((run / "summary.json").read_text())
    seconds = summary["seconds"]["train"]  # rounded to 0.1
    assert 4 * 8 / (seconds + 0.06) < summary["clips_per_s"] < 4 * 8 / (seconds - 0.06)
    assert summary["clips_per_s_median"] == statistics.median(rate for _, rate in series["train/clips_per_s"])
    (trace,) = (run / "profile").iterdir()
    names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    for optimizer in ("AdamW", "RuledOptimizer"):  # BiT-C's and the model's, once a step
        assert names.count(f"Optimizer.step#{optimizer}.step") == 2


def test_wandb_is_asked_for_by_name_and_missed_in_one_line(tmp_path, monkeypatch):
    check_tracker(TrainConfig())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_tracker(TrainConfig(wandb="project"))


def wandb_run(folder: Path, run_id: str) -> Wandb:
    config = load_config("demo", ["train.wandb=project", f"run.id={run_id}"])
    folder.mkdir(parents=True)
    return open_tracker(RunContext(config, None, torch.device("cpu"), 0, 1, folder))


def test_a_run_that_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    def init(**_) -> None:
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    refusal = "train.wandb=project: api_key not configured (no-tty). Call wandb.login: log in with `wandb login`, "
    with pytest.raises(UserError, match=re.escape(refusal)):
        wandb_run(tmp_path / "run", "1f")


def test_wandb_gets_every_line_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'agrepa_fast[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = wandb_run(tmp_path / "a" / "run", "1f")
    for step in (1, 2, 2):  # a resumed run writes a step again
        tracker.write(step, {"train/loss": 0.5})
    assert dict(tracker._run.summary)["train/loss"] == 0.5
    tracker.close()
    (written,) = tmp_path.glob("a/run/wandb/offline-run-*/*.wandb")
    assert written.stat().st_size > 0
    assert (tracker._run.id, tracker._run.name) == ("1f", "run")  # b/run is another run


def test_wandb_that_fails_costs_its_line_and_no_run(capsys):
    def log(values: dict) -> None:
        raise RuntimeError("no answer")

    tracker = Wandb.__new__(Wandb)
    tracker._run = SimpleNamespace(log=log)
    tracker.write(3, {"train/loss": 0.5})
    assert capsys.readouterr().err == "step 3: train.wandb: no answer; training goes on\n"
