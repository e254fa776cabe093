"""Metric models that say what a test wants, for evaluations from end to end."""

import csv
from pathlib import Path

import numpy as np
import pytest

from agrepa_fast.evaluation import evaluate
from agrepa_fast.evaluation.recogniser import Heard
from agrepa_fast.evaluation.selftest import SelfTest


class Model:
    """Every metric model at once: what it says depends on the loudness of the wave alone."""

    def __init__(self, calls: list):
        self.identity = {"spec": "package:fake", "sha256": "5a", "licence": "MIT", "version": "1"}
        self.spelling, self.names, self.dim, self.calls = {}, ("mos",), 2, calls

    def transcribe(self, wave, rate):
        self.calls.append("asr")
        return Heard("say 22" if np.abs(wave).mean() > 0 else "", -0.1)

    def score(self, wave, rate):
        self.calls.append("mos")
        return {"mos": 1 + 4 * float(np.abs(wave).mean())}

    def embed(self, wave, rate):
        self.calls.append("embed")
        return np.array([float(np.abs(wave).mean()), float(wave.std()), 1.0])


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list:
    """Which models were called, in turn."""
    made: list = []
    for name in ("load_recogniser", "load_mos", "load_embedding", "load_speaker"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: Model(made))
    monkeypatch.setattr(evaluate, "self_test", lambda *_: SelfTest(3.0, 2.0, 1.0, True))
    monkeypatch.setattr(evaluate, "distinctness", lambda *_: ())
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))
    return made


def clips(out: Path) -> list[dict]:
    with (out / "clips.csv").open(newline="") as file:
        return list(csv.DictReader(file))
