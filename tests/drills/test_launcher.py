"""The one test that goes through the real `deepspeed` launcher, with two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..ranks import ROOT, free_port
from ..testing import write_small_shards


def launch(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", "2", "--master_port", free_port(), ROOT / "agrepa_fast" / "train.py", *arguments]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.drill
def test_two_ranks_train_and_a_refusal_keeps_its_exit_code(tmp_path):
    preset = write_small_shards(tmp_path / "shards")
    done = launch(tmp_path, "--ds_config", "zero2.json", "--preset", str(preset), "run.dir=run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert summary["zero_stage"] == 2
    assert summary["selection"]

    again = launch(tmp_path, "--ds_config", "zero2.json", "--preset", str(preset), "run.dir=run")
    assert again.returncode == 2, again.stdout[-3000:] + again.stderr[-3000:]
    assert "already holds a run" in again.stdout + again.stderr
