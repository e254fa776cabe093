"""A user's model in the engine: trained, probed, aligned, saved, resumed elsewhere, sampled, exported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agrepa_fast import cli, load_model
from agrepa_fast.attribution.check_model import check_model
from agrepa_fast.attribution.csv import read_csv
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.models.registry import make_model

from ..ranks import run_training
from ..testing import MEL_BINS, VOCAB, assert_same_curve, small_batch, write_small_shards
from ..training.graphs_on_ranks import plant_captures

SIZES = [f"model.n_mels={MEL_BINS}", f"model.vocab={VOCAB}"]
PRESET = """
model: {backbone: "mine:Mine", options: {dim: 12}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with mine.py and a preset for it."""
    preset = write_small_shards(tmp_path / "shards")
    lines = [line for line in preset.read_text().splitlines() if line and not line.startswith("model:")]
    (tmp_path / "mine.yaml").write_text(PRESET + "\n".join(lines) + "\n")
    shutil.copy(Path(__file__).with_name("mine.py"), tmp_path)
    return tmp_path


def test_a_users_model_goes_through_the_engine(folder, monkeypatch):
    monkeypatch.chdir(folder)
    given = ("--preset", "mine.yaml", "model.options.depth=4", "train.save_every=3")
    run_training(1, *given, "--ds_config", "zero0.json", "run.dir=one", cwd=folder)
    run_training(2, *given, "--ds_config", "zero3.json", "run.dir=two", cwd=folder)
    assert_same_curve(folder / "one", folder / "two")
    summary = json.loads(Path("two/summary.json").read_text())
    assert summary["selection"].startswith("speech L")
    rows = read_csv(Path("two/attribution.csv"))
    assert {int(row["layer"]) for row in rows} == {1, 2, 3, 4}
    assert {row["measure"] for row in rows} == {"foga", "ridge", "cka"}  # LASP asks a token condition

    run_training(2, *given, "--ds_config", "zero2.json", "run.dir=three", "train.steps=5", cwd=folder)
    for newer in Path("three/checkpoints").glob("step00000005*"):
        shutil.rmtree(newer)
    Path("three/checkpoints/latest").write_text("step00000003")
    run_training(
        1, *given, "--ds_config", "zero0.json", "--resume", "latest", "run.dir=three", "train.steps=5", cwd=folder
    )
    assert_same_curve(folder / "one", folder / "three")

    model, config = load_model("three")
    assert config.model.options == {"dim": 12, "depth": 4}
    assert model.scale == 4
    cli.main(["probe", "three", "--out", "probe", "probe.clips=2"])
    cli.main(["sample", "three", "--clips", "1", "--out", "samples"])
    cli.main(["export", "three", "--out", "exported"])
    assert torch.equal(load_model("exported")[0].ids.weight, model.ids.weight)
    assert len(list(Path("samples").glob("*.wav"))) == 6


def test_voicebox_fills_in_spans_on_any_ranks(folder):
    sizes = {"dim": 16, "depth": 4, "heads": 2, "dim_head": 8, "token_dim": 8, "kernel_size": 5}
    options = json.dumps(load_config("voicebox").model.options | sizes)
    lines = (folder / "mine.yaml").read_text().splitlines()[2:]
    lines = [line for line in lines if not line.startswith("flow:")]
    given = load_config("voicebox").flow
    recipe = {
        name: getattr(given, name)
        for name in ("reference", "loss_region", "guidance_without", "sigma", "drop_all", "solver")
    }
    flow = ", ".join(f"{name}: {value}" for name, value in recipe.items())
    head = f"model: {{backbone: voicebox, options: {options}}}\nflow: {{steps: 4, average: frame, {flow}}}\n"
    (folder / "voicebox.yaml").write_text(head + "\n".join(lines) + "\n")
    given = ("--preset", "./voicebox.yaml", "train.precision=fp32", "train.lr=2e-4", "train.batch_frames=240")
    output = run_training(1, *given, "--ds_config", "zero0.json", "run.dir=one", cwd=folder)
    run_training(
        2, *given, "--ds_config", "zero3.json", "run.dir=two", "train.activation_checkpointing=true", cwd=folder
    )
    assert_same_curve(folder / "one", folder / "two")
    # Per frame and layer 3 x 16^2 + 16^2 + 2 x 16 x 64 products, per pair 2 x 16: a clip costs about 25 + 25^2 / 109.
    assert "global batches: 7 clips of up to 25 frames" in output
    rows = read_csv(folder / "two" / "attribution.csv")
    assert {int(row["layer"]) for row in rows} == {1, 2, 3, 4}
    losses = json.loads((folder / "two" / "summary.json").read_text())["val/flow_loss"]
    assert losses["last"] < losses["first"]


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("mine", "f5, voicebox, or MODULE:CLASS of a Backbone"),
        ("nowhere:Mine", "No module named 'nowhere'"),
        ("mine:Nothing", "has no attribute 'Nothing'"),
        ("mine:Block", "unexpected keyword argument 'n_mels'"),
        ("agrepa_fast:Config", "unexpected keyword argument 'n_mels'"),
        ("torch:device", "device"),
    ],
)
def test_what_is_no_backbone_is_refused_by_name(folder, monkeypatch, backbone, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="backbone=") as refusal:
        make_model(load_config("mine.yaml", [f"model.backbone={backbone}", "model.n_mels=8"]).model)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.options.size=3", "unexpected keyword argument 'size'"),
        ("model.backbone=mine:Broken", "velocity returned"),
        ("model.backbone=mine:Narrow", "layer 1 says width=5, and its states are (2, 24, 12)"),
        ("model.backbone=mine:Prefixed", "layer 1 has 25 states for 24 frames, where a stride leaves T/1, T/2"),
        ("model.backbone=mine:Raises", "mine.py:68, in velocity: AttributeError: 'Raises' object has no attribute"),
        ("align.k=4", "align.k=4 is more than the model's 3 layers"),
        ("align.strategy=fixed:7", "layers are numbered 1 to 3"),
        ("align.strategy=lasp", "align.strategy=lasp"),
        ("align.objective=haste", "compares attention, and model.backbone=mine:Mine cannot tell its queries and keys"),
        ("train.compile=true", "train.compile compiles AudioDiT's blocks"),
        ("model.dim=64", "model.options.dim"),
    ],
)
def test_settings_that_do_not_suit_the_model_end_a_run_before_it_begins(folder, override, message):
    output = run_training(1, "--preset", "mine.yaml", override, "run.dir=run", cwd=folder, wanted=2)
    assert message in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    assert not (folder / "run").exists()


def test_padding_that_changes_a_clip_is_said(folder):
    output = run_training(1, "--preset", "mine.yaml", "model.backbone=mine:Mixes", "run.dir=run", cwd=folder)
    assert "warning: Mixes: padding changes the velocity of a clip by" in output
    assert "warning" not in run_training(1, "--preset", "mine.yaml", "run.dir=other", cwd=folder)


def test_tokens_that_are_not_dropped_are_said(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = load_config("mine.yaml", ["model.backbone=mine:Insists", *SIZES])
    model = make_model(config.model)
    (warning,) = check_model(model, config.model, config.flow)
    assert "Insists: the velocity of a clip has its tokens although condition.keep_tokens is False" in warning
    assert not check_model(model, config.model, replace(config.flow, drop_tokens=0.0, guidance=1.0))
    mine = load_config("mine.yaml", SIZES)
    assert not check_model(make_model(mine.model), mine.model, mine.flow)


def test_a_dropped_reference_is_zero_in_every_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = make_model(load_config("mine.yaml", SIZES).model)
    mel, condition = small_batch()
    dropped = replace(condition, keep_reference=torch.tensor([True, False, True]))
    zero = replace(condition, reference=condition.reference * dropped.keep_reference[:, None, None])
    t = torch.full((3,), 0.5)
    assert torch.equal(model(mel, t, dropped).v, model(mel, t, zero).v)
    assert not torch.equal(model(mel, t, condition).v, model(mel, t, zero).v)


def test_a_users_model_with_frozen_weights_is_replayed_if_that_is_asked(folder):
    given = ("--preset", "mine.yaml", "--ds_config", "zero2.json")
    run_training(1, *given, "train.graphs=0", "run.dir=eager", cwd=folder)
    output = run_training(1, *given, "train.graphs=1", "run.dir=graphs", cwd=folder, plant=plant_captures)
    assert "CUDA graphs: 2 captured" in output
    assert_same_curve(folder / "eager", folder / "graphs")
