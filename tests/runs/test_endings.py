"""Runs that end unasked: a disk that fills up, lines cut by a kill, and messages."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from agrepa_fast import train
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.train import explain
from agrepa_fast.training import metrics
from agrepa_fast.training.metrics import Metrics, read_metrics


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


def test_loader_processes_end_with_a_run_that_fails(monkeypatch):
    """At a normal exit, Python would wait for one that hangs in a read."""
    batches, closed = TrainBatches.__new__(TrainBatches), []
    monkeypatch.setattr(TrainBatches, "close", lambda self: closed.append(self))

    def fail(batches, step):
        raise RuntimeError("of a bug")

    run = SimpleNamespace(step=fail, device=torch.device("cpu"), training_time=nullcontext, engine=Mock(), choice=None)
    run.config = SimpleNamespace(train=SimpleNamespace(steps=3))
    training = SimpleNamespace(run=run, checkpoints=None, batches=batches, first_step=1)
    monkeypatch.setattr(train, "build", lambda *_: training)
    with pytest.raises(RuntimeError, match="of a bug"):
        train.train(None, {}, None)
    assert closed == [batches]


@pytest.mark.parametrize(
    "cut", [b'{"step": 2, "train/lo', b'{"step": 2, "tr{"step": 2, "x": 1}\n', b"\0\0\0\n", b"7\n", b'{"step": "a"}\n']
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
    monkeypatch.setattr(ours, "print", said.append)
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
