"""Shards, runs and exports of version 0.1 are still read: made_by_0.1/README.md says how they were made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from agrepa_fast import load_model
from agrepa_fast.cli import main
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError

from ..ranks import run_training
from ..testing import metrics

MADE = Path(__file__).with_name("made_by_0.1")
MODEL = ("model.dim=8", "model.depth=3", "model.token_dim=4")  # of the run, beside the preset's settings


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A copy in the working folder, which paths in the run's settings start from."""
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same_losses(run: Path, steps: tuple[int, ...]) -> None:
    """The losses of these steps are those that version 0.1 wrote, on whatever processor that was."""
    ours, theirs = metrics(run), metrics(MADE / "run")
    for step in steps:
        losses = [name for name in theirs[step] if name.endswith("_loss")]
        assert losses
        for name in losses:
            assert ours[step][name] == pytest.approx(theirs[step][name], abs=2e-4), (step, name)


def test_shards_are_read_and_trained_on(made):
    run_training(1, "--preset", "shards/preset.yaml", "run.dir=new", *MODEL, cwd=made)
    assert_same_losses(made / "new", (0, 1, 2, 3))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (1, 3), (2, 0)])
def test_a_run_resumes(ranks, stage, made):
    """With DeepSpeed's own files, and from whole tensors on other ranks and stages."""
    output = run_training(ranks, "--ds_config", f"zero{stage}.json", "--resume", "latest", "run.dir=run", cwd=made)
    assert_same_losses(made / "run", (4, 5))
    assert ("converting the optimizer's state" in output) == ((ranks, stage) != (1, 2))
    assert (made / "run" / "checkpoints" / "latest").read_text() == "step00000005"


def test_a_run_is_probed_sampled_and_exported(made, no_pictures):
    main(["probe", "run", "--out", "probe"])
    assert "3,foga," in (made / "probe" / "attribution.csv").read_text()
    main(["sample", "run", "--clips", "1", "--out", "wavs"])
    assert len(list((made / "wavs").glob("*.wav"))) == 6
    main(["export", "run", "--out", "exported"])
    averaged = load_file(MADE / "run" / "checkpoints" / "step00000003" / "ema.safetensors")
    torch.testing.assert_close(load_model("exported")[0].state_dict(), averaged, atol=0, rtol=0)


def test_an_export_is_loaded_and_sampled(made, no_pictures):
    model, config = load_model("export")
    assert (config.model.dim, config.model.depth) == (8, 3)
    torch.testing.assert_close(model.state_dict(), load_file(made / "export" / "model.safetensors"), atol=0, rtol=0)
    main(["sample", "export", "--clips", "1", "--out", "wavs"])
    assert len(list((made / "wavs").glob("*.wav"))) == 6


def test_the_name_of_every_setting_is_known():
    """A setting that has gone is refused by one line that says what replaces it."""
    path, refusals = MADE / "run" / "config.yaml", []
    sections = yaml.safe_load(path.read_text())
    written = {f"{s}.{name}": json.dumps(value) for s, fields in sections.items() for name, value in fields.items()}
    assert len(written) == 113
    while len(refusals) < 30:
        try:
            load_config(path, [f"{name}={value}".replace('"', "") for name, value in written.items()])
            break
        except UserError as error:
            refusals.append(str(error))
            del written[min((name for name in written if name in str(error)), key=str(error).index)]
    assert [line for line in refusals if "is unknown" in line] == []
