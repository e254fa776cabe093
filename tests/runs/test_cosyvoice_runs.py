"""CosyVoice in the engine: from shards with speakers' vectors to a file that its package reads."""

import json
from pathlib import Path

import pytest
import torch

from agrepa_fast.attribution.csv import read_csv
from agrepa_fast.cli import main
from agrepa_fast.config_file import load_config

from ..models.cosyvoice import OPTIONS, ours, theirs
from ..ranks import run_training
from ..testing import CODES, N_MELS, SPEAKER_DIM, assert_same_curve, write_small_shards

SMALL_DIT = {"dim": 16, "depth": 3, "heads": 2, "dim_head": 8, "look_ahead_dim": 12, "dropout": 0.0, "streaming": 0.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("cosyvoice") / "shards", texts=True)


def preset(folder: Path, shards: Path, version: int, options: dict) -> tuple[str, str]:
    """A preset of small shards and model, with the recipe of cosyvoice<version>, as arguments."""
    recipe = load_config(f"cosyvoice{version}").flow
    names = (
        "sigma",
        "drop_tokens",
        "drop_reference",
        "drop_all",
        "average",
        "guidance",
        "guidance_without",
        "schedule",
    )
    lines = [
        "model: " + json.dumps({"backbone": f"cosyvoice{version}", "options": options}),
        "flow: " + json.dumps({"steps": 2} | {name: getattr(recipe, name) for name in names}),
        *(line for line in shards.read_text().splitlines() if line and not line.startswith(("model:", "flow:"))),
    ]
    text = "\n".join(lines).replace("data: {", "data: {speaker: 'campplus:none', normalize: false, ")
    (folder / "small.yaml").write_text(text + "\n")
    return "--preset", "./small.yaml"


def test_version_3_is_trained_and_probed_alike_on_any_ranks(tmp_path, shards, no_pictures):
    given = (*preset(tmp_path, shards, 3, SMALL_DIT), "train.steps=12", "train.lr=5e-4", "train.precision=fp32")
    run_training(1, *given, "--ds_config", "zero0.json", "run.dir=one", cwd=tmp_path)
    run_training(
        2, *given, "--ds_config", "zero3.json", "run.dir=two", "train.activation_checkpointing=true", cwd=tmp_path
    )
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    assert {row["layer"] for row in read_csv(tmp_path / "two/attribution.csv")} >= {"1", "2", "3"}
    losses = json.loads((tmp_path / "two/summary.json").read_text())["val/flow_loss"]
    assert losses["last"] < losses["first"]


def test_version_1_begins_with_a_flow_pt_and_ends_as_one(tmp_path, shards, monkeypatch, no_pictures):
    released = ours(1, N_MELS, CODES, SPEAKER_DIM)
    torch.save(released.to_upstream(dict(released.state_dict())) | {"epoch": 7, "step": 3}, tmp_path / "flow.pt")
    given = (*preset(tmp_path, shards, 1, OPTIONS[1]), "train.steps=3", "train.lr=1e-12", "probe.warmup_steps=1")
    output = run_training(
        1, *given, "--ds_config", "zero2.json", "run.dir=run", "train.start_from=flow.pt", cwd=tmp_path
    )
    assert "tensors of flow.pt, read as CosyVoice 1's MaskedDiffWithXvec (Apache-2.0)" in output
    rows = read_csv(tmp_path / "run/attribution.csv")
    assert {int(row["layer"]) for row in rows if row["measure"] == "foga"} == {1, 2, 3, 4, 5}  # stages
    monkeypatch.chdir(tmp_path)
    main(["export", "run", "--upstream", "--out", "tuned.pt"])
    tuned = torch.load("tuned.pt", weights_only=True)
    package = theirs(released, tuned)
    for name, weight in released.to_upstream(dict(released.state_dict())).items():
        torch.testing.assert_close(package.state_dict()[name], weight, rtol=1e-6, atol=1e-6)
