"""The training program around a run: its import path, and how it ends."""

import os
import runpy
import sys

import pytest
import torch

from agrepa_fast.train import main, run_process

from ..ranks import ROOT

FOLDER = str(ROOT / "agrepa_fast")


@pytest.mark.parametrize("before", [[FOLDER], []], ids=["script", "PYTHONSAFEPATH"])
def test_a_script_takes_its_own_folder_off_the_import_path_and_nothing_else(before, monkeypatch):
    others = [str(ROOT), *(entry for entry in sys.path if entry != FOLDER)]
    monkeypatch.setattr(sys, "path", [*before, *others])
    runpy.run_path(f"{FOLDER}/train.py", run_name="script")
    assert sys.path == others


def test_main_raises_and_a_process_exits_at_once_where_other_ranks_may_wait(capsys, monkeypatch):
    arguments, exits = ["--ds_config", "zero9.json"], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", exits.append)
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert (ending.value.code, exits) == (2, [])
    run_process(arguments)
    assert exits == [2]
    assert capsys.readouterr().err.count("agrepa train: ") == 2
