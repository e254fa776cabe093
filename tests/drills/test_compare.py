"""agrepa compare with its real jobs: the launcher, the training, the evaluation, and a kill between them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..ranks import ROOT
from ..testing import write_small_shards

pytestmark = pytest.mark.drill
METRICS = ("metrics.only=[mel]", "eval.vocoder=griffin-lim")


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("data") / "shards")


def command(preset: Path, out: str) -> list[str]:
    strategies = ("--strategies", "none,foga", "--strategies", "again:align.strategy=none")
    settings = ("--preset", str(preset), "--warmup", "3", "--seeds", "0,1", "--ranks", "1", "train.steps=8")
    return [sys.executable, "-m", "agrepa_fast.cli", "compare", *strategies, *settings, *METRICS, "--out", out]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def rows(out: Path) -> list[dict]:
    with (out / "differences.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_comparison_that_was_interrupted_ends_with_the_same_tables(preset, tmp_path):
    whole = subprocess.run(command(preset, "whole"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout[-3000:] + whole.stderr[-3000:]
    assert "14 jobs, 0 done" in whole.stdout
    assert "warm-ups of 3 steps, 6 runs of 5 steps" in whole.stdout
    losses = [
        json.loads(line) for line in (tmp_path / "whole" / "warmup-seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(row["step"] for row in losses) == 3
    same = [row for row in rows(tmp_path / "whole") if row["strategy"] == "again"]
    assert same
    assert all(float(row["difference"]) == 0 for row in same), "arms that are the same do not differ"
    assert any(float(row["difference"]) != 0 for row in rows(tmp_path / "whole") if row["strategy"] == "foga")

    process = subprocess.Popen(command(preset, "cut"), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (tmp_path / "cut" / "foga-seed0" / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not (tmp_path / "cut" / "foga-seed0" / "evaluate").exists()
    again = subprocess.run(command(preset, "cut"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    plan = json.loads((tmp_path / "cut" / "plan.json").read_text())
    assert len(plan) == 14
    other = subprocess.run(
        [*command(preset, "cut"), "train.lr=1e-4"], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert other.returncode == 2
    assert b"holds another comparison" in other.stderr
