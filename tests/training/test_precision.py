import json
from dataclasses import replace

import pytest
import torch

from agrepa_fast.config import Config, ModelConfig, TrainConfig
from agrepa_fast.config_file import save_config
from agrepa_fast.training import precision
from agrepa_fast.training.precision import bf16_gain, choose_precision

from ..ranks import run_training
from ..testing import metrics

CPU, WIDE = torch.device("cpu"), ModelConfig(dim=128, heads=2, depth=4)


@pytest.fixture
def gain(monkeypatch):
    """A processor with instructions for bf16, on which it has this gain."""

    def set_gain(value: float, **capabilities) -> None:
        found = capabilities or {"avx512_bf16": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        monkeypatch.setattr(precision, "bf16_gain", lambda model: value)

    return set_gain


def choose(
    train="auto", model=WIDE, ds_values=None, device=CPU, resumed=None, start_from=None
) -> tuple[str, str | None]:
    config = Config(model=model, train=TrainConfig(precision=train, start_from=start_from))
    config, line = choose_precision(config, ds_values or {}, device, resumed)
    return config.train.precision, line


def test_bf16_is_taken_where_it_wins_by_a_quarter(gain):
    gain(1.26)
    taken, line = choose()
    assert taken == "bf16"
    assert line.startswith("train.precision=auto: bf16, since bf16 runs at 1.26 x fp32's speed")
    gain(1.24)
    taken, line = choose()
    assert taken == "fp32"
    assert line.startswith("train.precision=auto: fp32, since bf16 runs at 1.24 x")


def test_what_is_decided_is_not_measured(gain):
    gain(2.0)
    assert choose("fp32") == ("fp32", None)
    assert choose(device=torch.device("cuda")) == ("auto", None)
    assert choose(ds_values={"bf16": {"enabled": False}}) == ("auto", None)
    assert choose(model=replace(WIDE, dim=64)) == ("auto", None)
    assert choose(ds_values={"bf16": {"enabled": "auto"}})[0] == "bf16"
    gain(2.0, avx512_bf16=False, amx_bf16=False)
    assert choose() == ("auto", None)


def test_branches_have_the_precision_of_their_warm_up(gain, tmp_path):
    """Each would measure for itself, and near the bound they would not agree."""
    (tmp_path / "export.json").write_text("{}")
    for value, of_run in ((2.0, "fp32"), (1.0, "bf16")):
        gain(value)
        save_config(Config(model=WIDE, train=TrainConfig(precision=of_run)), tmp_path / "config.yaml")
        taken, line = choose(start_from=str(tmp_path))
        assert taken == of_run
        assert line == f"train.precision=auto: {of_run}, that of train.start_from={tmp_path}"
        assert choose(resumed=tmp_path) == (of_run, None)
    save_config(Config(model=WIDE), tmp_path / "config.yaml")  # of a GPU
    assert choose(resumed=tmp_path) == ("auto", None)
    assert choose(start_from=str(tmp_path))[0] == "fp32"


def test_the_gain_is_measured_and_changes_no_random_state():
    before = torch.random.get_rng_state()
    assert 0.01 < bf16_gain(WIDE) < 100
    assert torch.equal(torch.random.get_rng_state(), before)


def take_bf16() -> None:
    torch.cpu.get_capabilities = lambda: {"amx_bf16": True}
    precision.bf16_gain = lambda model: 2.0
    precision._NARROW = 1


def test_a_run_says_what_it_took_and_keeps_it(preset, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "align.strategy=none", "train.save_every=2")
    output = run_training(2, *args, "train.steps=2", cwd=tmp_path, plant=take_bf16)
    assert output.count("train.precision=auto: bf16, since bf16 runs at 2.00 x") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["precision"] == "bf16"
    output = run_training(2, "--resume", "latest", "run.dir=run", "train.steps=4", cwd=tmp_path)
    assert "train.precision=auto" not in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["precision"], summary["seconds_since_step"]) == ("bf16", 2)
    assert metrics(tmp_path / "run")[4]["val/flow_loss"] > 0
