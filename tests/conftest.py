"""Fixtures that tests of several folders share."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

if "torch" not in sys.modules:  # threads that wait sleep instead of spinning; importing the package imports kernels
    runpy.run_path(str(Path(__file__).parents[1] / "agrepa_fast" / "openmp.py"))

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several workers share the cores

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

from agrepa_fast.attribution.foga import ProbeBatch
from agrepa_fast.models.audio_dit.dit import AudioDiT

from .ranks import ROOT, leave_out_pictures, run_training
from .testing import small_batch, small_model, write_small_shards, write_small_whisper


@pytest.fixture(autouse=True)
def _default_device(request):
    """Tests of a backend make their tensors on the GPU if there is one (benchmarks/gpu_suite.py runs them there)."""
    if "backend" in request.fixturenames and torch.cuda.is_available():
        with torch.device("cuda"):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _forget_users_modules(tmp_path_factory):
    """A module that a test wrote, such as mine.py, is not the next test's, nor is a search path."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path_factory.getbasetemp())):
            del sys.modules[name]


@pytest.fixture
def model() -> AudioDiT:
    return small_model()


@pytest.fixture
def probe_batch() -> ProbeBatch:
    mel, condition = small_batch()
    return ProbeBatch(mel, condition, torch.tensor([0, 1, 0]), (0, 1, 2))


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Plots are empty files and sounds are silence in this test's own process."""
    leave_out_pictures(monkeypatch.setattr)


@pytest.fixture(scope="session")
def preset(tmp_path_factory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def ds_configs(tmp_path_factory) -> dict[int, str]:
    """The presets; stage 3 without its threshold, below which small parameters would stay whole on every rank."""
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    values = json.loads((ROOT / "agrepa_fast" / "presets" / "zero3.json").read_text())
    values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(values))
    return {0: "zero0.json", 1: "zero1.json", 2: "zero2.json", 3: str(path)}


@pytest.fixture(scope="session")
def baseline(preset, tmp_path_factory) -> Path:
    """One rank, stage 0: what all others must equal."""
    folder = tmp_path_factory.mktemp("baseline")
    run_training(1, "--ds_config", "zero0.json", "--preset", str(preset), f"run.dir={folder}/run", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="session")
def whisper(tmp_path_factory) -> Path:
    return write_small_whisper(tmp_path_factory.mktemp("whisper"))
