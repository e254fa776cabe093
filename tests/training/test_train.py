"""The training program around a run: its import path, and how it ends."""

import os
import runpy
import sys
from types import SimpleNamespace

import pytest

from agrepa_fast import train
from agrepa_fast.checkpoints.load import load_checkpoint
from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.errors import UserError
from agrepa_fast.train import main, run_process
from agrepa_fast.training import builder, inputs, start
from agrepa_fast.training.inputs import read_inputs

from ..ranks import ROOT

FOLDER = str(ROOT / "agrepa_fast")


@pytest.mark.parametrize("before", [[FOLDER], []], ids=["script", "PYTHONSAFEPATH"])
def test_a_script_takes_its_own_folder_off_the_import_path_and_nothing_else(before, monkeypatch):
    others = [str(ROOT), *(entry for entry in sys.path if entry != FOLDER)]
    monkeypatch.setattr(sys, "path", [*before, *others])
    runpy.run_path(f"{FOLDER}/train.py", run_name="script")
    assert sys.path == others


def test_a_resume_takes_the_newest_run_of_its_preset(tmp_path, monkeypatch):
    """`demo-long-…` begins with `demo-`, too."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(
        ("demo-20260101-120000-aaaaaa", "demo-20260102-120000-bbbbbb", "demo-long-20260103-120000-cccccc")
    ):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        save_config(load_config(name.partition("-2026")[0], [f"train.steps={1000 + number}"]), folder / "config.yaml")
        os.utime(folder / "config.yaml", (number, number))
    config, _ = read_inputs("demo", [], "zero2.json", "latest")
    assert config.train.steps == 1001
    config, _ = read_inputs("demo-long", [], "zero2.json", "latest")
    assert config.train.steps == 1002
    assert read_inputs("demo", ["run.dir=null"], "zero0.json", "latest") == read_inputs(
        "demo", [], "zero0.json", "latest"
    )
    with pytest.raises(UserError, match="no run of preset 'demo-f5'"):
        read_inputs("demo-f5", [], "zero2.json", "latest")


def test_ranks_wait_for_hours_while_one_prepares_the_demo_and_for_nothing_else(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(builder, "from_rank_0", lambda make: SimpleNamespace(folder=None))
    monkeypatch.setattr(builder, "load_index", lambda *_, **__: None)
    monkeypatch.setattr(builder, "set_collective_timeout", waits.append)
    builder.prepared_index(load_config("demo"))
    assert waits == [12 * 60, 30]
    builder.prepared_index(load_config("demo", [f"data.path={tmp_path}"]))
    assert waits[2:] == [30]


def test_a_rank_that_sees_other_files_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "from_rank_0", lambda check: SimpleNamespace(folder=tmp_path / "not here"))
    with pytest.raises(UserError, match="not here"):
        builder.prepared_index(load_config("demo"))
    checkpoints = SimpleNamespace(config=load_config("demo"))
    with pytest.raises(UserError, match="is not seen by every rank"):
        load_checkpoint(tmp_path / "step1", checkpoints, None, None, None)


def test_all_ranks_start_from_the_checkpoint_that_rank_0_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "from_rank_0", lambda find: tmp_path / "step2")  # this rank would find another
    config = start.fix_start(load_config("demo", [f"train.start_from={tmp_path}/run"]))
    assert config.train.start_from == f"{tmp_path}/step2"
    for given in ("null", f"{tmp_path}/theirs.pt"):
        config = load_config("demo", [f"train.start_from={given}"])
        assert start.fix_start(config) == config


def test_main_raises_and_a_process_exits_at_once_where_other_ranks_may_wait(capsys, monkeypatch):
    arguments, exits = ["--ds_config", "zero9.json"], []
    monkeypatch.setattr(inputs, "complete_launch_environment", lambda: 1)
    monkeypatch.setattr(train, "dist", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(os, "_exit", exits.append)
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert (ending.value.code, exits) == (2, [])
    run_process(arguments)
    assert exits == [2]
    assert capsys.readouterr().err.count("agrepa train: ") == 2
