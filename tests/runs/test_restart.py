"""A run that ended before its first save starts again, and nothing of it is lost."""

import json
import shutil

import pytest

from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.errors import UserError
from agrepa_fast.files import FolderLock
from agrepa_fast.training.folder import locate_run, open_folder

from ..ranks import call_on_ranks, run_training
from ..testing import metrics
from .test_refusals import refuse

SETTINGS = ("run.dir=run", "align.strategy=none", "train.steps=3")


def test_a_run_without_a_checkpoint_starts_again(preset, tmp_path):
    """By the same command, and by --resume latest."""
    args = ("--preset", str(preset), *SETTINGS)
    run, left = tmp_path / "run", "in_run_before"
    output = run_training(1, *args, "train.lr=1e30", "train.warmup_steps=0", cwd=tmp_path, wanted=2)
    assert "lower train.lr" in output
    assert not list(run.glob("checkpoints/step*"))
    (run / left).touch()
    first = (run / "metrics.jsonl").read_bytes()
    for attempt, command in ((1, args), (2, ("--resume", "latest", "run.dir=run"))):
        output = run_training(1, *command, "train.lr=1e-3", "train.warmup_steps=2", cwd=tmp_path)
        assert output.count(f"starts again from step 0; the files of the attempt are in run/attempt-{attempt}") == 1
        assert sorted(metrics(run)) == [0, 1, 2, 3]
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()].count(0) == 1
        assert (run / "checkpoints" / "latest").read_text() == "step00000003"
        shutil.rmtree(run / "checkpoints")
        (run / "summary.json").unlink()
    assert (run / "attempt-1" / "metrics.jsonl").read_bytes() == first
    assert load_config(run / "attempt-1" / "config.yaml").train.lr == 1e30
    assert (run / left).exists()


def test_a_run_with_results_or_another_tag_does_not_start_again(tmp_path):
    config = load_config("demo", [f"run.dir={tmp_path}"])
    save_config(config, tmp_path / "config.yaml")
    for resume in (None, "latest"):
        assert locate_run(config, resume)[1] is None
    with pytest.raises(UserError, match="no checkpoint"):
        locate_run(config, "step00000003")
    (tmp_path / "summary.json").touch()
    with pytest.raises(UserError, match="already holds a run"):
        locate_run(config, None)
    with pytest.raises(UserError, match="no checkpoint"):
        locate_run(config, "latest")
    (tmp_path / "summary.json").unlink()
    damaged = tmp_path / "checkpoints" / "step00000003"
    damaged.mkdir(parents=True)
    (damaged / "checkpoint.json").write_text('{"files": {"ema.safetensors": 7}, "saved": 1, "step": 3}')
    with pytest.raises(UserError, match="already holds a run"):
        locate_run(config, None)
    with pytest.raises(UserError, match=r"step00000003 is damaged: ema\.safetensors has no bytes, not 7"):
        locate_run(config, "latest")


def test_an_attempt_that_is_under_way_is_left_alone(tmp_path):
    save_config(load_config("demo"), tmp_path / "config.yaml")
    with FolderLock(tmp_path, "wait"), pytest.raises(UserError, match="in use by"):
        open_folder(tmp_path, new=True)
    assert (tmp_path / "config.yaml").exists()
    open_folder(tmp_path, new=True).release()
    (tmp_path / "summary.json").touch()  # another process has trained to the end since locate_run
    open_folder(tmp_path, new=False).release()
    with pytest.raises(UserError, match="already holds a run"):
        open_folder(tmp_path, new=True)


def test_a_refusal_leaves_an_earlier_attempt_where_it_is(preset, tmp_path):
    """That of train.copy_to, of the dry run, and of W&B."""
    run, taken = tmp_path / "run", tmp_path / "taken"
    run.mkdir()
    taken.touch()
    save_config(load_config(str(preset)), run / "config.yaml")
    attempt = (run / "config.yaml").read_bytes()
    new = ("--ds_config", "zero0.json", "--preset", str(preset), f"run.dir={run}")
    faults = [
        ("training.builder.drop_later_probes", UserError("not reached"), 0, (*new, f"train.copy_to={taken}")),
        ("training.builder.lines_before_the_first_step", UserError("no memory"), 0, new),
        ("training.builder.open_tracker", UserError("no login"), 0, new),
    ]
    (ended,) = call_on_ranks(1, refuse, faults)
    assert [code for code, _ in ended] == [2, 2, 2]
    for (_, said), words in zip(ended, ("train.copy_to", "no memory", "no login"), strict=True):
        assert words in said
    assert (run / "config.yaml").read_bytes() == attempt
    assert {path.name for path in run.iterdir()} == {"config.yaml", "plots", ".lock"}
