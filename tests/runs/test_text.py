"""Runs of a model that takes text and speakers: its clips, ids and refusals."""

import json
import shutil
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from agrepa_fast import cli
from agrepa_fast.attribution.csv import read_csv
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.prepare import pipeline
from agrepa_fast.training.builder import DEMOS, prepared_index

from ..ranks import run_training
from ..testing import assert_same_curve, write_small_shards

PRESET = """
model: {backbone: "mine:Reads", options: {dim: 12}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with mine.py, a vocabulary, and a preset."""
    lines = write_small_shards(tmp_path / "shards", texts=True).read_text().splitlines()
    added = "data: {text: 'chars:vocab.txt', speaker: 'campplus:none', "
    lines = [line.replace("data: {", added) for line in lines if "model:" not in line]
    (tmp_path / "reads.yaml").write_text(PRESET + "\n".join(lines) + "\n")
    (tmp_path / "vocab.txt").write_text(" \n" + "".join(f"{letter}\n" for letter in "aysm0123456789"))
    shutil.copy(Path(__file__).with_name("mine.py"), tmp_path)
    return tmp_path


def test_a_model_of_text_trains_on_clips_with_transcripts(folder, monkeypatch, no_pictures):
    given = ("--preset", "reads.yaml", "train.save_every=3")
    output = run_training(1, *given, "--ds_config", "zero0.json", "run.dir=one", cwd=folder)
    assert "data.text=chars:vocab.txt: 15 ids; clips with a transcript of their own: speech 14 of 22" in output
    run_training(2, *given, "--ds_config", "zero3.json", "run.dir=two", "data.workers=1", cwd=folder)
    assert_same_curve(folder / "one", folder / "two")
    assert json.loads((folder / "two/summary.json").read_text())["selection"].startswith("speech L")
    assert {row["domain"] for row in read_csv(folder / "two/attribution.csv")} == {"speech"}
    monkeypatch.chdir(folder)
    cli.main(["probe", "two", "--out", "probe", "probe.clips=2"])
    cli.main(["sample", "two", "--clips", "1", "--out", "samples"])
    assert len(list(Path("samples").glob("*.wav"))) == 3

    newest = max(Path("one/checkpoints").glob("step*"))
    shutil.rmtree(newest)
    (folder / "one/checkpoints/latest").write_text("step00000003")
    vocabulary = Path("vocab.txt").read_text()
    Path("vocab.txt").write_text(vocabulary.replace("a\ny", "y\na"))
    output = run_training(
        1, *given, "--ds_config", "zero0.json", "--resume", "latest", "run.dir=one", cwd=folder, wanted=2
    )
    assert "Traceback" not in output
    assert "shards" in output.strip().splitlines()[-1]
    Path("vocab.txt").write_text(vocabulary)
    run_training(1, *given, "--ds_config", "zero0.json", "--resume", "latest", "run.dir=one", cwd=folder)
    assert_same_curve(folder / "one", folder / "two")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.text=null", "model.backbone=mine:Reads: it takes text: set data.text"),
        ("model.backbone=mine:Mine", "data.text=chars:vocab.txt, but model.backbone=mine:Mine takes no text: set"),
        ("data.speaker=null", "was prepared with data.speaker=campplus:none, the run has None"),
        ("model.speaker_dim=9", "have speaker vectors of 3 channels: leave model.speaker_dim out"),
        ("model.text_vocab=9", "model.text_vocab=9, but data.text=chars:vocab.txt has 15 ids: leave"),
        ("data.text=chars:none.txt", "none.txt cannot be read: No such file"),
        ("probe.clips=15", "15 speech clips of the train split are wanted, 14 are there"),
    ],
)
def test_settings_that_do_not_suit_each_other_end_a_run_before_it_begins(folder, override, message):
    output = run_training(1, "--preset", "reads.yaml", override, "run.dir=run", cwd=folder, wanted=2)
    assert message in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    assert not (folder / "run").exists()


@pytest.mark.parametrize("preset", DEMOS)
def test_the_demos_shards_are_made_if_they_are_missing(preset, tmp_path, monkeypatch):
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "prepare_demo", lambda config, out: made.append((config.data.long, out)))
    data = load_config(preset).data
    with pytest.raises(UserError, match=f"{data.path} is no folder"):  # nothing was made
        prepared_index(load_config(preset))
    assert made == [(data.long, Path(data.path))]
    find = PathFinder.find_spec
    monkeypatch.setattr(PathFinder, "find_spec", lambda name: None if name == "f5_tts" else find(name))
    with pytest.raises(UserError, match="f5_tts is not installed" if preset == "demo-f5" else "is no folder"):
        prepared_index(load_config(preset))


def test_presets_on_the_demo_share_its_shards():
    data = {preset: replace(load_config(preset).data, text=None) for preset in DEMOS}
    assert data["demo"] == data["demo-f5"]
    assert len({one.path for one in data.values()}) == len({str(one) for one in data.values()}) == 2
