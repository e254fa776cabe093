"""Training end to end: the same curve at every ZeRO stage and rank count."""

import csv
import json

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from agrepa_fast.attribution.foga import FogaProbe
from agrepa_fast.device import CaptureError

from ..ranks import run_training, start_training
from ..testing import assert_same_curve, attribution, metrics


def test_baseline_aligns_after_the_warm_up(baseline):
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


def test_a_run_as_users_start_it_shows_its_work(preset, baseline, tmp_path):
    """The one run in a process of its own, which makes its plots and sounds."""
    args = ("--ds_config", "zero0.json", "--preset", str(preset), "run.dir=run")
    (process,) = start_training(1, *args, cwd=tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    run = tmp_path / "run"
    assert_same_curve(baseline, run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["vocoder"].startswith("Griffin-Lim")
    assert summary["store_contribute_rank_correlation"].keys() == {"speech", "audio"}
    assert summary["val/flow_loss_by_time"] == {"0.5": pytest.approx(summary["val/flow_loss"]["ema"])}
    for name in ("attribution", "loss", "mel", "layer_time", "stability", "store_contribute"):
        assert (run / "plots" / f"{name}.png").stat().st_size > 5000
    wavs = {f"{domain}-1-{kind}.wav" for domain in ("speech", "audio") for kind in ("truth", "sample", "codes")}
    assert {path.name for path in (run / "samples").iterdir()} == wavs
    assert all(soundfile.read(run / "samples" / name)[0].any() for name in wavs)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == 6 + 4, "of the clips and of the plots"
    assert f"0.5 {summary['val/flow_loss']['ema']:.3f}" in page
    assert list((run / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("stage", "ranks", "extra"),
    [
        pytest.param(3, 1, (), marks=pytest.mark.drill),
        (1, 2, ()),
        (2, 2, ("data.workers=2",)),
        pytest.param(3, 2, (), marks=pytest.mark.drill),
        (3, 2, ("train.accumulation=4",)),  # one clip at a time: a rank has one domain, the other is absent
    ],
)
def test_every_stage_and_rank_count_gives_the_same_curve(stage, ranks, extra, preset, baseline, ds_configs, tmp_path):
    args = ("--ds_config", ds_configs[stage], "--preset", str(preset), f"run.dir={tmp_path}/run", *extra)
    run_training(ranks, *args, cwd=tmp_path)
    assert_same_curve(baseline, tmp_path / "run")
    assert (tmp_path / "run" / "selection.json").is_file()


@pytest.mark.parametrize("strategy", ["gradnorm", pytest.param("foga-vjp", marks=pytest.mark.drill)])
def test_strategies_measure_the_same_at_every_stage(strategy, preset, ds_configs, tmp_path):
    """Gradients of whole batches, gathered from partitions; a backward beside the engine's; pooled states."""
    args = ("--preset", str(preset), f"align.strategy={strategy}", "model.token_dim=32")
    runs = [(0, 1, ()), (2, 2, ("train.accumulation=2",)), (3, 2, ())]
    for stage, ranks, extra in runs if strategy == "gradnorm" else [runs[0], runs[-1]]:
        run = f"run.dir={tmp_path}/stage{stage}"
        run_training(ranks, "--ds_config", ds_configs[stage], *args, run, *extra, cwd=tmp_path)
        assert_same_curve(tmp_path / "stage0", tmp_path / f"stage{stage}")
    selection = json.loads((tmp_path / "stage0" / "selection.json").read_text())
    assert selection["strategy"] == strategy
    assert metrics(tmp_path / "stage0")[5]["train/align_loss"] > 0


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


def test_gradient_norms_in_bf16_are_near_those_in_fp32(preset, ds_configs, tmp_path):
    args, found = ("--preset", str(preset), "align.strategy=gradnorm", "train.steps=4"), {}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (3, "bf16")):
        run = tmp_path / f"{precision}{stage}"
        given = (f"run.dir={run}", f"train.precision={precision}", *args)
        run_training(1, "--ds_config", ds_configs[stage], *given, cwd=tmp_path)
        found[run.name] = [row[-1] for row in attribution(run) if row[:2] == ("1", "gradnorm")]
    for name, norms in found.items():
        assert norms == pytest.approx(found["fp320"], rel=0.05), name


@pytest.mark.parametrize("stage", [0, 3])
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


def let_probes_fail() -> None:
    def refuse(*_) -> None:
        raise CaptureError("operation not permitted")

    FogaProbe.launch = refuse


def test_a_run_whose_probes_all_fail_ends_with_its_checkpoints(preset, tmp_path):
    given = ("--ds_config", "zero2.json", "--preset", str(preset), "run.dir=run", "train.save_every=2")
    output = run_training(2, *given, cwd=tmp_path, wanted=2, plant=let_probes_fail)
    assert output.count("the probe failed and training goes on") == 3
    last = output.strip().splitlines()[-1]
    assert "agrepa train: 3 probes in a row failed, up to step 4: the probe cannot be captured" in last
    assert "Traceback" not in output
    run_training(2, *given, "--resume", "latest", cwd=tmp_path)  # from step 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["selection"].startswith("speech L")
