"""Threads that wait sleep soon, unless the user wants otherwise."""

import os
import subprocess
import sys

import pytest

from agrepa_fast import openmp

from ..ranks import ROOT

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def test_libgomp_of_a_training_process_has_the_spin_count():
    """libgomp itself says so: a variable that is set after it was loaded would not count."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    shown = subprocess.run(
        [sys.executable, ROOT / "agrepa_fast" / "train.py", "--help"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    counts = [line.partition("=")[2].strip() for line in shown.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert counts
    assert set(counts) == {f"'{openmp.SPIN_COUNT}'"}, shown.stderr


@pytest.mark.parametrize(
    ("given", "loaded", "wanted"),
    [
        ({}, False, {"GOMP_SPINCOUNT": str(openmp.SPIN_COUNT)}),
        ({}, True, {}),
        ({"GOMP_SPINCOUNT": "7"}, False, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, False, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_the_user_s_settings_and_a_loaded_torch_win(given, loaded, wanted, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    openmp.limit_spinning()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == wanted
