"""Training end to end: the same curve at every ZeRO stage and rank count, exact resume, and clear refusals."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .runs import ROOT, metrics, run_training, start_training, write_small_shards


@pytest.fixture(scope="session")
def preset(tmp_path_factory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def ds_configs(tmp_path_factory) -> dict[int, str]:
    """The presets; stage 3 without its threshold, below which small parameters would stay whole on every rank."""
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    values = json.loads((ROOT / "agrepa_fast" / "presets" / "zero3.json").read_text())
    values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(values))
    return {0: "zero0.json", 1: "zero1.json", 2: "zero2.json", 3: str(path)}


@pytest.fixture(scope="session")
def baseline(preset, tmp_path_factory) -> Path:
    """One rank, stage 0: what all others must equal."""
    folder = tmp_path_factory.mktemp("baseline")
    run_training(1, "--ds_config", "zero0.json", "--preset", str(preset), f"run.dir={folder}/run", cwd=folder)
    return folder / "run"


def assert_same_curve(run: Path, other: Path, first_step: int = 0, tolerance: float = 1e-5) -> None:
    a, b = metrics(run), metrics(other)
    assert a.keys() == b.keys()
    for step in (step for step in a if step >= first_step):
        for name in a[step].keys() & b[step].keys():
            if "loss" in name:
                assert a[step][name] == pytest.approx(b[step][name], abs=tolerance), (step, name)
        assert a[step].keys() - {"train/grad_norm"} == b[step].keys() - {"train/grad_norm"}
    averaged = [json.loads((r / "summary.json").read_text())["val/flow_loss"]["ema"] for r in (run, other)]
    assert averaged[0] == pytest.approx(averaged[1], abs=tolerance)
    for left, right in zip(*(attribution(r) for r in (run, other)), strict=True):
        assert left[:5] == right[:5]
        assert left[5] == pytest.approx(right[5], abs=tolerance), left


def attribution(run: Path) -> list[tuple]:
    with (run / "attribution.csv").open() as file:
        rows = csv.DictReader(file)
        return [(r["step"], r["measure"], r["domain"], r["layer"], r["t"], float(r["score"])) for r in rows]


def test_baseline_aligns_after_the_warm_up_and_shows_its_work(baseline):
    values = metrics(baseline)
    assert [values[step]["train/align_loss"] > 0 for step in (1, 2, 3, 4, 5)] == [False] * 3 + [True] * 2
    assert set(values) == {0, 1, 2, 3, 4, 5}
    assert "val/flow_loss" in values[0]
    assert "val/flow_loss" in values[5]
    selection = json.loads((baseline / "selection.json").read_text())
    assert selection["strategy"] == "foga"
    assert selection["step"] == 2
    assert all(len(layers) == 2 for layers in selection["layers"].values())
    with (baseline / "attribution.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = {(row["step"], row["measure"], row["layer"]) for row in rows}
    wanted = [(str(step), "foga") for step in (1, 2, 5)] + [("5", "ridge"), ("5", "cka")]
    assert measured == {(*probe, str(layer)) for probe in wanted for layer in (1, 2, 3, 4)}
    summary = json.loads((baseline / "summary.json").read_text())
    assert summary["vocoder"].startswith("Griffin-Lim")
    assert summary["store_contribute_rank_correlation"].keys() == {"speech", "audio"}
    for name in ("attribution", "loss", "mel", "layer_time", "stability", "store_contribute"):
        assert (baseline / "plots" / f"{name}.png").stat().st_size > 5000
    wavs = {f"{domain}-1-{kind}.wav" for domain in ("speech", "audio") for kind in ("truth", "sample")}
    assert {path.name for path in (baseline / "samples").iterdir()} == wavs
    assert list((baseline / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("stage", "ranks", "extra"),
    [
        (1, 1, ()),
        (2, 1, ()),
        (3, 1, ()),
        (0, 2, ()),
        (1, 2, ()),
        (2, 2, ()),
        (3, 2, ()),
        (2, 2, ("train.accumulation=2",)),
        (3, 2, ("train.accumulation=4",)),  # one clip at a time: a rank has one domain, the other is absent
        (2, 1, ("data.workers=2",)),
    ],
)
def test_every_stage_and_rank_count_gives_the_same_curve(stage, ranks, extra, preset, baseline, ds_configs, tmp_path):
    args = ("--ds_config", ds_configs[stage], "--preset", str(preset), f"run.dir={tmp_path}/run", *extra)
    run_training(ranks, *args, cwd=tmp_path)
    assert_same_curve(baseline, tmp_path / "run")
    assert (tmp_path / "run" / "selection.json").is_file()


@pytest.mark.parametrize("strategy", ["gradnorm", "foga-vjp", "lasp"])
def test_strategies_measure_the_same_at_every_stage(strategy, preset, ds_configs, tmp_path):
    """Gradients of whole batches, gathered from partitions; a backward beside the engine's; pooled states."""
    args = ("--preset", str(preset), f"align.strategy={strategy}", "model.token_dim=32")
    runs = [(0, 1, ()), (1, 2, ()), (2, 2, ("train.accumulation=2",)), (3, 2, ())]
    for stage, ranks, extra in runs if strategy == "gradnorm" else [runs[0], runs[-1]]:
        run = f"run.dir={tmp_path}/stage{stage}"
        run_training(ranks, "--ds_config", ds_configs[stage], *args, run, *extra, cwd=tmp_path)
        assert_same_curve(tmp_path / "stage0", tmp_path / f"stage{stage}")
    selection = json.loads((tmp_path / "stage0" / "selection.json").read_text())
    assert selection["strategy"] == strategy
    assert metrics(tmp_path / "stage0")[5]["train/align_loss"] > 0


@pytest.mark.parametrize(
    ("stage", "ranks", "stop", "extra"),
    [
        (0, 1, 1, ()),  # in the warm-up
        (2, 2, 2, ()),  # the probe that decides is under way
        (2, 2, 3, ()),  # after the choice
        (3, 2, 3, ()),
        (2, 2, 4, ("align.refresh=2", "train.steps=7")),  # a second choice is under way
        (2, 1, 3, ("model.dropout=0.2",)),  # the state of the random generator comes back, too
    ],
)
def test_resume_equals_the_uninterrupted_run(stage, ranks, stop, extra, preset, baseline, ds_configs, tmp_path):
    args = ("--ds_config", ds_configs[stage], f"run.dir={tmp_path}/run")
    first = ("--preset", str(preset), f"train.save_every={stop}", "train.keep=9", *extra)
    run_training(ranks, *args, *first, cwd=tmp_path)
    uninterrupted = metrics(tmp_path / "run")
    ema_loss = json.loads((tmp_path / "run" / "summary.json").read_text())["val/flow_loss"]["ema"]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # what a kill leaves
    run_training(ranks, *args, "--resume", f"step{stop:08d}", cwd=tmp_path)
    resumed = metrics(tmp_path / "run")
    assert resumed.keys() == uninterrupted.keys()
    for step in resumed:
        assert resumed[step] == pytest.approx(uninterrupted[step], abs=1e-6), step
    resumed_summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert resumed_summary["val/flow_loss"]["ema"] == pytest.approx(ema_loss, abs=1e-6)
    if not extra:
        assert_same_curve(baseline, tmp_path / "run")
    ended = sorted((tmp_path / "run" / "checkpoints").glob(f"step{max(resumed):08d}*"))
    heads = [load_file(folder / "heads.safetensors") for folder in ended]
    assert len(ended) == 2
    assert heads[0].keys() == heads[1].keys()
    for name in heads[0]:
        torch.testing.assert_close(heads[1][name], heads[0][name], atol=1e-6, rtol=1e-5)
    chosen = [json.loads((folder / "selection.json").read_text()) for folder in ended]
    assert chosen[0]["layers"] == chosen[1]["layers"]
    assert chosen[0]["step"] == chosen[1]["step"] == (6 if "align.refresh=2" in extra else 2)


def test_a_fault_that_rank_0_finds_stops_every_rank_with_one_line(preset, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(preset.parent, shards)
    victim = shards / "train-audio-0001.tar"
    damaged = bytearray(victim.read_bytes())
    damaged[3000] ^= 1
    victim.write_bytes(damaged)
    processes = start_training(2, "--preset", str(preset), f"data.path={shards}", cwd=tmp_path)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "train-audio-0001.tar has SHA-256" in outputs[0]
    assert "Traceback" not in "".join(outputs)
    assert "agrepa train:" not in outputs[1]


@pytest.mark.parametrize(
    ("number", "stage", "extra"),
    [
        (signal.SIGTERM, 2, ("data.workers=1",)),
        (signal.SIGUSR1, 3, ()),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_a_save(number, stage, extra, preset, ds_configs, tmp_path):
    """A scheduler's warning: both ranks exit 0, and what was lost is nothing."""
    args = ("--ds_config", ds_configs[stage], "--preset", str(preset), "train.steps=60", "train.val_every=60")
    settings = ("probe.warmup_steps=4", "align.refresh=10", *extra)
    run_training(2, *args, "run.dir=whole", *settings, cwd=tmp_path)
    ranks = start_training(2, *args, "run.dir=stopped", *settings, cwd=tmp_path)
    written = tmp_path / "stopped" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (written.is_file() and written.read_text().count("\n") >= 5):
        assert time.monotonic() < until
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
        time.sleep(0.02)
    ranks[1].send_signal(number)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "stopped by a signal, saved" in outputs[0]
    last = max(metrics(tmp_path / "stopped"))
    assert last < 60
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == f"step{last:08d}"
    assert not (tmp_path / "stopped" / "summary.json").exists()
    run_training(2, "--ds_config", ds_configs[stage], "--resume", "latest", "run.dir=stopped", cwd=tmp_path)
    assert_same_curve(tmp_path / "whole", tmp_path / "stopped")


def test_an_error_of_our_own_ends_a_run_with_loader_processes(preset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the folder of checkpoints should be")
    args = ("--preset", str(preset), "run.dir=run", "data.workers=1", "align.strategy=none", "train.steps=3")
    assert "Traceback" in run_training(1, *args, cwd=tmp_path, wanted=1)


def test_a_run_starts_from_the_averaged_weights_of_another(preset, baseline, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "train.steps=3", f"train.start_from={baseline}")
    run_training(1, *args, cwd=tmp_path)
    averaged = json.loads((baseline / "summary.json").read_text())["val/flow_loss"]["ema"]
    assert metrics(tmp_path / "run")[0]["val/flow_loss"] == pytest.approx(averaged, abs=1e-6)
    source = tmp_path / "source"
    shutil.copytree(baseline, source)
    args = ("--preset", str(preset), "run.dir=gone", "train.steps=4", f"train.start_from={source}")
    run_training(1, *args, "train.save_every=2", "train.lr=1e-12", "align.lr=1e-12", cwd=tmp_path)
    theirs, ours = (
        load_file(next((run / "checkpoints").glob("step*")) / "heads.safetensors")
        for run in (source, tmp_path / "gone")
    )
    torch.testing.assert_close(ours["bitc.speech.weight"], theirs["bitc.speech.weight"], atol=1e-6, rtol=0)
    shutil.rmtree(source)  # a resume does not need it
    run_training(1, "--resume", "step00000002", "run.dir=gone", cwd=tmp_path)
    args = ("--preset", str(preset), f"run.dir={tmp_path}/other", f"train.start_from={baseline}", "model.dim=16")
    output = run_training(1, *args, cwd=tmp_path, wanted=2)
    assert "another architecture than this run's" in output
    assert not (tmp_path / "other").exists()


def test_an_interrupted_save_loses_nothing(preset, tmp_path):
    """A folder without its marker is removed, tags are never written twice, and old checkpoints are rotated away."""
    args = ("--preset", str(preset), "run.dir=run", "align.strategy=random", "train.save_every=2")
    run_training(1, *args, "train.steps=4", cwd=tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    assert {path.name for path in folder.glob("step*")} == {"step00000002", "step00000004"}
    (folder / "step00000004" / "checkpoint.json").unlink()
    (folder / "latest").write_text("step00000002")  # the order of a save: the marker, then `latest`
    run_training(1, "--resume", "latest", "run.dir=run", "train.save_every=3", cwd=tmp_path)
    assert {path.name for path in folder.glob("step*")} == {"step00000003", "step00000004"}
    assert (folder / "latest").read_text() == "step00000004"
    run_training(1, "--resume", "step00000003", "run.dir=run", cwd=tmp_path)
    assert {path.name for path in folder.glob("step*")} == {"step00000004", "step00000004-2"}
    assert (folder / "latest").read_text() == "step00000004-2"


@pytest.mark.parametrize(
    ("strategy", "layers"), [("none", {}), ("fixed:2,4", {"speech": [2, 4], "audio": [2, 4]}), ("shallow", None)]
)
def test_other_strategies_align_from_the_start_and_are_measured_at_the_end(strategy, layers, preset, tmp_path):
    run_training(1, "--preset", str(preset), "run.dir=run", f"align.strategy={strategy}", "train.steps=3", cwd=tmp_path)
    run = tmp_path / "run"
    chosen = json.loads((run / "selection.json").read_text())
    assert chosen["layers"] == ({"speech": [1, 2], "audio": [1, 2]} if layers is None else layers)
    assert [metrics(run)[step]["train/align_loss"] > 0 for step in (1, 3)] == [strategy != "none"] * 2
    assert {row[:2] for row in attribution(run)} == {("3", "foga"), ("3", "ridge"), ("3", "cka")}
    assert (run / "plots" / "attribution.png").is_file()


def test_layers_are_chosen_early_once_the_choice_is_sure(preset, tmp_path):
    """Pooled over two probes; a resume from before the choice makes the same one."""
    arguments = ["--preset", str(preset), "run.dir=run", "probe.warmup_steps=4", "probe.pool=2", "train.save_every=1"]
    out = run_training(1, *arguments, "probe.confidence=0.01", "train.keep=9", cwd=tmp_path)
    assert "decided early, 3 probes saved" in out
    selection = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert selection["step"] == 1
    assert 0.01 < min(d["top_k_probability"] for d in selection["evidence"].values()) <= 1
    arguments[2] = "run.dir=unsure"
    out = run_training(1, *arguments, "train.keep=9", cwd=tmp_path)
    assert "decided early" not in out
    whole = json.loads((tmp_path / "unsure" / "selection.json").read_text())
    assert whole["step"] == 4
    shutil.rmtree(tmp_path / "unsure" / "checkpoints" / "step00000005")
    (tmp_path / "unsure" / "selection.json").unlink()
    run_training(1, *arguments, "train.keep=9", "--resume", "step00000003", cwd=tmp_path)
    assert json.loads((tmp_path / "unsure" / "selection.json").read_text()) == whole


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(preset, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "train.lr=1e30", "train.warmup_steps=0", "train.save_every=1")
    output = run_training(1, *args, "train.log_every=5", cwd=tmp_path, wanted=2)
    assert "lower train.lr" in output
    assert "Traceback" not in output
    for path in (tmp_path / "run" / "checkpoints").glob("step*"):
        assert int(path.name[4:]) < 3


def test_gradient_norms_in_bf16_are_near_those_in_fp32(preset, ds_configs, tmp_path):
    args, found = ("--preset", str(preset), "align.strategy=gradnorm", "train.steps=3"), {}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")):
        run = tmp_path / f"{precision}{stage}"
        given = (f"run.dir={run}", f"train.precision={precision}", *args)
        run_training(1, "--ds_config", ds_configs[stage], *given, cwd=tmp_path)
        found[run.name] = [row[-1] for row in attribution(run) if row[:2] == ("1", "gradnorm")]
    for name, norms in found.items():
        assert norms == pytest.approx(found["fp320"], rel=0.05), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_trains_and_keeps_fp32_averages(stage, preset, baseline, ds_configs, tmp_path):
    """What GPUs run, here on the CPU: close to fp32, and the exported weights are not rounded to bf16."""
    args = ("--ds_config", ds_configs[stage], "--preset", str(preset), f"run.dir={tmp_path}/run")
    run_training(1, *args, "train.precision=bf16", cwd=tmp_path)
    assert_same_curve(baseline, tmp_path / "run", tolerance=0.1)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step*")
    for name in ("model", "ema"):
        weights = load_file(checkpoint / f"{name}.safetensors")["out.weight"]
        assert weights.dtype == torch.float32
        assert not torch.equal(weights, weights.bfloat16().float())


class TestRefusals:
    """One line, exit code 2, nothing written."""

    def refused(self, preset, cwd, *arguments) -> str:
        output = run_training(1, "--preset", str(preset), *arguments, cwd=cwd, wanted=2)
        lines = [line for line in output.splitlines() if line.startswith("agrepa train: ")]
        assert len(lines) == 1, output
        assert "Traceback" not in output
        return lines[0]

    def test_a_run_folder_that_holds_another_run(self, preset, baseline):
        before = (baseline / "metrics.jsonl").read_bytes()
        assert "already holds a run" in self.refused(preset, baseline, f"run.dir={baseline}")
        assert (baseline / "metrics.jsonl").read_bytes() == before

    def test_another_architecture(self, preset, tmp_path):
        run = ("run.dir=run", "train.steps=3", "align.strategy=none")
        run_training(1, "--preset", str(preset), *run, cwd=tmp_path)
        line = self.refused(preset, tmp_path, "run.dir=run", "--resume", "latest", "model.depth=5", "train.steps=9")
        assert "another architecture: model.depth is 4" in line  # and the run is as it was:
        assert "saved with ZeRO stage 2, this run has 1" in self.refused(
            preset, tmp_path, "run.dir=run", "--resume", "latest", "--ds_config", "zero1.json"
        )
        line = self.refused(preset, tmp_path, "run.dir=run", "--resume", "latest", "train.batch_clips=4")
        assert "train.batch_clips is 8 there and 4" in line
        line = self.refused(preset, tmp_path, "run.dir=run", "--resume", "latest", "align.strategy=shallow")
        assert "align.strategy is none there" in line
        assert "no checkpoint 'step7'" in self.refused(preset, tmp_path, "run.dir=run", "--resume", "step7")

    @pytest.mark.parametrize(
        ("ds_config", "message"),
        [
            ("{", "is no JSON"),
            ("[1]", "a JSON object is wanted"),
            ('{"train_micro_batch_size_per_gpu": 3}', "3 contradicts the run's 8"),
            ('{"bf16": {"enabled": true}}', "contradicts fp32 on cpu"),
            ('{"fp16": {"enabled": true}}', "bf16 or fp32"),
            ('{"optimizer": {"type": "Adam"}}', "remove it"),
            ('{"bf16": true}', "an object is wanted"),
            ('{"zero_optimization": {"stage": 9}}', "stage 9 is unknown"),
            ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}', "DeepSpeed refuses"),
        ],
    )
    def test_a_ds_config_that_is_wrong(self, ds_config, message, preset, tmp_path):
        (tmp_path / "ds.json").write_text(ds_config)
        assert message in self.refused(preset, tmp_path, "--ds_config", "ds.json")
        assert {path.name for path in tmp_path.iterdir()} <= {"ds.json", "runs"}
        assert not list(tmp_path.glob("runs/*/config.yaml"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--ds_config", "zero4.json"), "did you mean 'zero"),
            (("train.batch_clips=7", "train.accumulation=2"), "choose a multiple of 2"),
            (("data.path=nowhere",), "agrepa prepare"),
            (("probe.clips=23",), "23 speech clips of the train split are wanted, 22 are there"),
            (("model.vocab=99",), "model.vocab=99"),
            (("--resume", "latest", "run.dir=nowhere"), "holds no run"),
            (("data.hop_length=300",), "hop_length=256"),
            (("data.audio_teacher=package:whisper-base",), "prepared with data.audio_teacher=openai/whisper-large-v3"),
            (("eval.vocoder=package:hifigan",), "eval.vocoder"),
            (("eval.vocoder=grifin-lim",), "did you mean 'griffin-lim'"),
        ],
    )
    def test_a_setting_that_is_wrong(self, arguments, message, preset, tmp_path):
        assert message in self.refused(preset, tmp_path, *arguments)
        assert not list(tmp_path.iterdir())
