"""Exact resume, signals, interrupted saves, and starting from another run."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agrepa_fast import train
from agrepa_fast.checkpoints.save import Checkpoints
from agrepa_fast.checkpoints.weights import export
from agrepa_fast.config_file import load_config
from agrepa_fast.seeds import clip_keys
from agrepa_fast.training import run as run_module
from agrepa_fast.training.run import Run

from ..ranks import run_training
from ..testing import assert_same_curve, metrics

FALLING = ("align.objective=sra", "align.decay=linear")
PENDING_CHOICE = ("align.refresh=2", "train.steps=7", "align.choice=soft", "probe.pool=3")


@pytest.mark.parametrize(
    ("stage", "ranks", "stops", "extra"),
    [
        pytest.param(0, 1, (1,), (), marks=pytest.mark.drill),  # in the warm-up
        (2, 2, (2, 3), ()),  # while the probe that decides is under way, and after the choice
        pytest.param(3, 2, (3,), (), marks=pytest.mark.drill),
        pytest.param(2, 2, (4,), PENDING_CHOICE, marks=pytest.mark.drill),  # a second choice is under way
        # averaged weights take part, the weight falls, and the state of the random generator comes back
        (3, 2, (3,), (*FALLING, "model.dropout=0.2", "train.optimizer=muon")),
    ],
)
def test_resume_equals_the_uninterrupted_run(stage, ranks, stops, extra, preset, baseline, ds_configs, tmp_path):
    run = tmp_path / "run [1]+(2)"
    args = ("--ds_config", ds_configs[stage], f"run.dir={run}")
    first = ("--preset", str(preset), "train.save_every=1", "train.keep=9", *extra)
    run_training(ranks, *args, *first, cwd=tmp_path)
    uninterrupted, ema_loss = metrics(run), averaged_loss(run)
    last = max(uninterrupted)
    heads, chosen = final_state(run / "checkpoints" / f"step{last:08d}")
    assert chosen["step"] == (6 if "align.refresh=2" in extra else 2)
    for number, stop in enumerate(stops, start=2):
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "train/lo')  # what a kill leaves
        run_training(ranks, *args, "--resume", f"step{stop:08d}", cwd=tmp_path)
        resumed = metrics(run)
        assert resumed.keys() == uninterrupted.keys()
        for step in resumed:
            assert resumed[step] == pytest.approx(uninterrupted[step], abs=1e-6), step
        assert averaged_loss(run) == pytest.approx(ema_loss, abs=1e-6)
        if not extra:
            assert_same_curve(baseline, run)
        resumed_heads, resumed_choice = final_state(run / "checkpoints" / f"step{last:08d}-{number}")
        torch.testing.assert_close(resumed_heads, heads, atol=1e-6, rtol=1e-5)
        assert (resumed_choice["layers"], resumed_choice["step"]) == (chosen["layers"], chosen["step"])


def averaged_loss(run: Path) -> float:
    return json.loads((run / "summary.json").read_text())["val/flow_loss"]["ema"]


def final_state(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The alignment heads and the selection of a checkpoint."""
    selection = json.loads((checkpoint / "selection.json").read_text())
    return load_file(checkpoint / "heads.safetensors"), selection


LONG = ("train.steps=9", "train.val_every=9", "probe.warmup_steps=4", "align.refresh=4")


def signal_rank_1(number: int) -> None:
    """Let rank 1 get a signal amid its fifth step."""
    if os.environ["RANK"] == "1":
        step = Run.step

        def step_with_a_signal(self, batches, at):
            if at == 4:
                os.kill(os.getpid(), number)
            step(self, batches, at)

        Run.step = step_with_a_signal


@pytest.fixture(scope="module")
def whole(preset, tmp_path_factory) -> Path:
    """A run that no signal stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(2, "--ds_config", "zero2.json", "--preset", str(preset), "run.dir=run", *LONG, cwd=folder)
    return folder / "run"


@pytest.mark.parametrize(
    ("number", "stage", "extra"),
    [
        (signal.SIGTERM, 2, ("data.workers=1",)),
        pytest.param(signal.SIGUSR1, 3, (), marks=pytest.mark.drill),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_a_save(number, stage, extra, preset, whole, ds_configs, tmp_path):
    """A scheduler's warning: both ranks exit 0 and nothing is lost."""
    args = ("--ds_config", ds_configs[stage], "run.dir=stopped")
    given = (*args, "--preset", str(preset), *LONG, *extra)
    output = run_training(2, *given, cwd=tmp_path, plant=functools.partial(signal_rank_1, number))
    assert "step 6: stopped by a signal, saved" in output
    stopped = tmp_path / "stopped"
    assert max(metrics(stopped)) == 6
    assert (stopped / "checkpoints" / "latest").read_text() == "step00000006"
    assert not (stopped / "summary.json").exists()
    run_training(2, *args, "--resume", "latest", cwd=tmp_path)
    assert_same_curve(whole, stopped)


def signal_after_the_last_step() -> None:
    finish = train.finish

    def finish_with_a_signal(*given) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        finish(*given)

    train.finish = finish_with_a_signal


def test_a_signal_after_the_last_step_does_not_cost_the_results(preset, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "align.strategy=none", "train.steps=3")
    run_training(1, *args, cwd=tmp_path, plant=signal_after_the_last_step)
    assert (tmp_path / "run" / "summary.json").exists()


def plant_a_bug() -> None:
    def save(*_, **__) -> None:
        raise TypeError("of a bug")

    Checkpoints.save = save


def test_an_error_of_our_own_ends_a_run_with_loader_processes(preset, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "data.workers=1", "align.strategy=none", "train.steps=3")
    output = run_training(1, *args, cwd=tmp_path, wanted=1, plant=plant_a_bug)
    assert "Traceback" in output
    assert output.strip().splitlines()[-1].endswith("agrepa train: rank 0: TypeError: of a bug")


def test_a_file_in_the_place_of_the_checkpoints_ends_a_run_before_it_begins(preset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    output = run_training(1, "--preset", str(preset), "run.dir=run", cwd=tmp_path, wanted=2)
    assert "run.dir run/checkpoints cannot be written (File exists)" in output


def test_a_run_starts_from_the_averaged_weights_of_another(preset, baseline, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "train.steps=4", f"train.start_from={baseline}")
    run_training(1, *args, cwd=tmp_path)
    assert load_config(tmp_path / "run/config.yaml").train.start_from == f"{baseline}/checkpoints/step00000005"
    averaged = json.loads((baseline / "summary.json").read_text())["val/flow_loss"]["ema"]
    assert metrics(tmp_path / "run")[0]["val/flow_loss"] == pytest.approx(averaged, abs=1e-6)
    source = tmp_path / "source"
    shutil.copytree(baseline, source)
    args = ("--preset", str(preset), "run.dir=gone", "train.steps=4", f"train.start_from={source}")
    args = (*args, "train.save_every=2", "train.lr=1e-12", "align.lr=1e-12", "flow.sigma=0.4")
    output = run_training(1, *args, cwd=tmp_path)
    assert "its weights are of flow.sigma=0.5, and this run's are not" in output
    theirs, ours = (
        load_file(next((run / "checkpoints").glob("step*")) / "heads.safetensors")
        for run in (source, tmp_path / "gone")
    )
    torch.testing.assert_close(ours["bitc.speech.weight"], theirs["bitc.speech.weight"], atol=1e-6, rtol=0)
    shutil.rmtree(source)  # a resume does not need it
    run_training(1, "--resume", "step00000002", "run.dir=gone", cwd=tmp_path)
    run_training(1, *args, "--resume", "step00000002", cwd=tmp_path)  # the whole command, as of a job that is requeued
    other = (*args, "--resume", "step00000002", f"train.start_from={baseline}")
    output = run_training(1, *other, cwd=tmp_path, wanted=2)
    assert f"train.start_from is {source}/checkpoints/step00000005 there and {baseline} in this run" in output
    args = ("--preset", str(preset), f"run.dir={tmp_path}/other", f"train.start_from={baseline}")
    assert "another architecture than this run's" in run_training(1, *args, "model.dim=16", cwd=tmp_path, wanted=2)
    output = run_training(1, *args, "model.time_scale=30", cwd=tmp_path, wanted=2)
    assert "its model.time_scale is 1000.0, and this run's is 30.0: set model.time_scale=1000.0" in output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 2)])
def test_a_bf16_run_starts_from_whole_averages(stage, ranks, preset, baseline, ds_configs, tmp_path):
    """Not from those that its forward rounds."""
    given = ("--preset", str(preset), "--ds_config", ds_configs[stage], f"train.start_from={baseline}", "run.dir=run")
    run_training(
        ranks, *given, "train.precision=bf16", "align.strategy=none", "train.steps=1", "train.lr=1e-12", cwd=tmp_path
    )
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step*")
    (source,) = (baseline / "checkpoints").glob("step*5")
    theirs = load_file(source / "ema.safetensors")
    for name in ("model", "ema"):
        for key, weight in load_file(checkpoint / f"{name}.safetensors").items():
            torch.testing.assert_close(weight, theirs[key], atol=1e-8, rtol=0)


def note_seed() -> None:
    """Write the seed of the noise to a file."""

    def noted(seed: int, *given) -> torch.Tensor:
        Path("seed").write_text(str(seed))
        return clip_keys(seed, *given)

    run_module.clip_keys = noted


def test_no_run_of_a_line_repeats_the_draws_of_another(preset, baseline, tmp_path):
    """Each starts from the one before and has its seed. A resume, of earlier versions' checkpoints too, draws on."""

    def seed_of(name: str, *given: str) -> int:
        run_training(1, f"run.dir={name}", *given, cwd=tmp_path, plant=note_seed)
        return int((tmp_path / "seed").read_text())

    given = ("--preset", str(preset), "align.strategy=none", "train.steps=1")
    child = seed_of("child", *given, f"train.start_from={baseline}")
    grandchild = seed_of("grandchild", *given, "train.start_from=child")
    export(tmp_path / "grandchild/checkpoints/step00000001", tmp_path / "exported")
    last = seed_of("last", *given, "train.start_from=exported")
    assert len({load_config(baseline / "config.yaml").run.seed, child, grandchild, last}) == 4
    shutil.rmtree(tmp_path / "child")  # a resume does not need it
    again = (*given, "train.start_from=child", "train.steps=2")
    assert seed_of("grandchild", "--resume", "latest", *again) == grandchild
    assert seed_of("grandchild", "--resume", "latest", "train.steps=3") == grandchild
    marker = tmp_path / "grandchild/checkpoints/step00000003/checkpoint.json"
    facts = json.loads(marker.read_text())
    marker.write_text(json.dumps({name: value for name, value in facts.items() if name != "generation"}))
    assert seed_of("grandchild", "--resume", "latest", "train.steps=4") == child  # as its version drew


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule(preset, tmp_path):
    """The schedule of the shorter one has ended at 0."""
    given = ("--preset", str(preset), "run.dir=run", "align.strategy=none", "train.warmup_steps=0", "train.final_lr=0")
    run_training(1, *given, "train.steps=2", "train.save_every=1", "train.keep=9", cwd=tmp_path)
    run_training(1, "--resume", "latest", "run.dir=run", "train.steps=4", cwd=tmp_path)
    before, after = (load_file(tmp_path / f"run/checkpoints/step0000000{n}/model.safetensors") for n in (2, 3))
    assert not any(torch.equal(before[name], after[name]) for name in before)


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


def choices_at_steps() -> None:
    step = Run.step

    def step_after_a_copy(self, batches, at):
        if (file := self.context.folder / "selection.json").exists():
            shutil.copy(file, file.with_name(f"before{at + 1}.json"))
        step(self, batches, at)

    Run.step = step_after_a_copy


def test_layers_are_chosen_early_once_the_choice_is_sure(preset, tmp_path):
    """Pooled over two probes; a resume from before the choice makes the same one."""
    arguments = ["--preset", str(preset), "run.dir=run", "probe.warmup_steps=4", "train.steps=6"]
    arguments += ["probe.pool=2", "train.save_every=1"]
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
    shutil.rmtree(tmp_path / "unsure" / "checkpoints" / "step00000006")
    run_training(1, *arguments, "train.keep=9", "--resume", "step00000003", cwd=tmp_path, plant=choices_at_steps)
    assert not (tmp_path / "unsure" / "before4.json").exists(), "layers of the later checkpoint, before it chose again"
    assert json.loads((tmp_path / "unsure" / "selection.json").read_text()) == whole
