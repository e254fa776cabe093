"""Runs that end unasked: one process per folder, a disk that fills up, lines cut by a kill, and messages."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.errors import UserError
from agrepa_fast.files import claim
from agrepa_fast.train import explain
from agrepa_fast.training import metrics
from agrepa_fast.training.metrics import Metrics, read_metrics

from ..ranks import ROOT

CLAIM = """
import os, sys
from pathlib import Path
from agrepa_fast.files import claim
claim(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    os.read(0, 1)  # a loader process, which lives on for a while
    os._exit(0)
print(child, flush=True)
os.read(0, 1)
"""


def test_a_run_folder_is_one_process_s(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child = int(other.stdout.readline())
    with pytest.raises(UserError, match=f"in use by process {other.pid} on"):
        claim(tmp_path)
    other.kill()
    other.wait()
    os.kill(child, 0)  # its loader process is still there
    claim(tmp_path)
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[pair.cc:537] gloo: Connection reset by peer"), "another rank ended"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader process ended"),
        (ValueError("of a\nbug"), "ValueError: of a bug"),
    ],
)
def test_what_is_said(error, said):
    assert said in explain(error)
    assert "\n" not in explain(error)


@pytest.mark.parametrize(
    "cut", [b'{"step": 2, "train/lo', b'{"step": 2, "tr{"step": 2, "x": 1}\n', b"\0\0\0\n", b"7\n"]
)
def test_a_line_that_was_cut_costs_itself(cut, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + cut + b'\n{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n')
    assert read_metrics(path)["loss"] == [(1, 2.0), (3, 1.0), (4, 0.5)]
    metrics._drop_later_steps(path, 3)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n'


def test_a_full_disk_costs_metrics_and_no_run(tmp_path, monkeypatch):
    said = []
    ours = Metrics(tmp_path, 0, 1, None)
    monkeypatch.setattr(ours, "say", said.append)
    ours.open(4, 0)
    file, full = ours._file, [False]

    def write(line: bytes) -> int:
        if full[0]:
            raise OSError(28, "No space left on device")
        return file.write(line)

    ours._file = SimpleNamespace(write=write, close=file.close)
    for step in (1, 2, 3, 4):
        full[0] = step in (2, 3)
        ours.write(step, {"loss": float(step)})
    ours.close()
    assert read_metrics(tmp_path / "metrics.jsonl")["loss"] == [(1, 1.0), (4, 4.0)]
    assert [line.partition(":")[0] for line in said] == ["step 2", "step 3"]


def test_a_kill_leaves_a_run_its_configuration(tmp_path, monkeypatch):
    """config.yaml is written again by every resume."""
    path, config = tmp_path / "config.yaml", load_config("demo", ["run.seed=7"])
    save_config(config, path)

    def killed(file, text):
        with file.open("w") as stream:
            stream.write(text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        save_config(config, path)
    assert load_config(path).run.seed == 7
