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
STEPS = 40  # of a branch: a signal after its first step must come before its last


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("data") / "shards")


def command(preset: Path, out: str) -> list[str]:
    strategies = ("--strategies", "none,foga", "--strategies", "again:align.strategy=none")
    settings = ("--preset", str(preset), "--warmup", "3", "--seeds", "0,1", "--ranks", "1", f"train.steps={3 + STEPS}")
    return [sys.executable, "-m", "agrepa_fast.cli", "compare", *strategies, *settings, *METRICS, "--out", out]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def rows(out: Path) -> list[dict]:
    with (out / "differences.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged_step(run: Path) -> int:
    """Return the last whole step in a run's metrics.jsonl, -1 if it has none."""
    file = run / "metrics.jsonl"
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=-1)


def assert_same_rows(found: list[dict], wanted: list[dict]) -> None:
    """Numbers of a resumed run may differ in their last digits."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, text in theirs.items():
            try:
                assert float(ours[name]) == pytest.approx(float(text), abs=1e-4, nan_ok=True), (name, theirs)
            except ValueError:
                assert ours[name] == text


def test_a_comparison_that_was_interrupted_ends_with_the_same_tables(preset, tmp_path):
    whole = subprocess.run(command(preset, "whole"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout[-3000:] + whole.stderr[-3000:]
    assert "14 jobs, 0 done" in whole.stdout
    assert f"warm-ups of 3 steps, 6 runs of {STEPS} steps" in whole.stdout
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
    branch = tmp_path / "cut" / "foga-seed0"
    while logged_step(branch) < 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not (branch / "evaluate").exists()
    while not (branch / "checkpoints" / "latest").exists():  # the rank outlives its launcher, until it has saved
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 1 <= logged_step(branch) < STEPS, "it will resume, not begin again"
    assert not (branch / "summary.json").exists()
    again = subprocess.run(command(preset, "cut"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert [*(branch / "checkpoints").glob(f"step{STEPS:08d}*")]
    assert_same_rows(rows(tmp_path / "cut"), rows(tmp_path / "whole"))
    plan = json.loads((tmp_path / "cut" / "plan.json").read_text())
    assert len(plan) == 14
    other = subprocess.run(
        [*command(preset, "cut"), "train.lr=1e-4"], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert other.returncode == 2
    assert b"holds another comparison" in other.stderr
