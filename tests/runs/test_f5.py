"""F5-TTS in the engine: trained on transcripts, its layers chosen, resumed elsewhere, fine-tuned from its own file."""

import json
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from agrepa_fast import cli, load_model
from agrepa_fast.attribution.csv import read_csv
from agrepa_fast.config_file import load_config

from ..attribution.test_peers import INSTALL
from ..ranks import run_training
from ..testing import assert_same_curve, metrics, write_small_shards

if find_spec("f5_tts") is None:
    pytest.skip(INSTALL, allow_module_level=True)

SIZES = {"dim": 32, "heads": 2, "dim_head": 16, "dropout": 0.0, "ff_mult": 2}
NETWORKS = {
    "f5-v1": {"depth": 3, "conv_layers": 1, "text_dim": 16},
    "e2": {"depth": 4, "network": "UNetT", "text_mask_padding": False, "pe_attn_head": 1},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a vocabulary, and a preset of each network with the recipe of the package."""
    content = yaml.safe_load(write_small_shards(tmp_path / "shards", texts=True).read_text())
    (tmp_path / "vocab.txt").write_text(" \n" + "".join(f"{letter}\n" for letter in "aysm0123456789"))
    for preset, options in NETWORKS.items():
        given = load_config(preset)
        content["model"] = {"backbone": "f5", "options": SIZES | options}
        content["data"] |= {"text": "chars:vocab.txt", "speaker": "campplus:none", "normalize": given.data.normalize}
        content["flow"] = asdict(given.flow) | {"steps": 4}
        content["train"] |= {"steps": 20, "log_every": 1, "val_every": 10, "save_every": 10, "precision": "fp32"}
        content["train"] |= {"lr_decay": given.train.lr_decay, "final_lr": given.train.final_lr}
        content["probe"] |= {"start_step": 4, "every": 4, "warmup_steps": 8}
        (tmp_path / f"{preset}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def check_run(run: Path, preset: str) -> dict:
    """The loss falls, every layer is measured, some are chosen; returns the summary."""
    losses = [values["train/flow_loss"] for step, values in metrics(run).items() if step]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val/flow_loss"]["last"] < summary["val/flow_loss"]["first"]
    assert summary["selection"].startswith("speech L")
    layers = range(1, NETWORKS[preset]["depth"] + 1)
    assert {int(row["layer"]) for row in read_csv(run / "attribution.csv")} == set(layers)
    return summary


@pytest.mark.drill
def test_e2_learns_and_aligns_under_zero_3(folder):
    run_training(1, "--preset", "./e2.yaml", "--ds_config", "zero3.json", "run.dir=run", cwd=folder)
    check_run(folder / "run", "e2")


def test_a_run_learns_aligns_resumes_elsewhere_and_is_fine_tuned(folder, monkeypatch, no_pictures):
    given = ("--preset", "./f5-v1.yaml")
    run_training(1, *given, "--ds_config", "zero0.json", "run.dir=one", "train.keep=9", cwd=folder)
    summary = check_run(folder / "one", "f5-v1")

    shutil.copytree(folder / "one", folder / "two")
    for newer in (folder / "two/checkpoints").glob("step00000020*"):
        shutil.rmtree(newer)
    (folder / "two/checkpoints/latest").write_text("step00000010")
    run_training(
        2, *given, "--ds_config", "zero3.json", "--resume", "latest", "run.dir=two",
        "train.activation_checkpointing=true", cwd=folder,
    )  # fmt: skip
    assert_same_curve(folder / "one", folder / "two", first_step=11, tolerance=1e-4)

    monkeypatch.chdir(folder)
    cli.main(["export", "two", "--upstream", "--out", "model_20.safetensors"])
    output = run_training(
        1, *given, "run.dir=three", "train.start_from=model_20.safetensors", "train.steps=3",
        "probe.start_step=1", "probe.warmup_steps=1", cwd=folder,
    )  # fmt: skip
    assert "of model_20.safetensors, read as f5_tts's" in output
    assert "CC-BY-NC-4.0" in output
    tuned = json.loads((folder / "three/summary.json").read_text())
    assert tuned["selection"].startswith("speech L")
    assert tuned["val/flow_loss"]["first"] == pytest.approx(summary["val/flow_loss"]["ema"], abs=1e-4)
    assert load_model("three")[0].upstream
