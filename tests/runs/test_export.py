"""Exports: whole weights and settings in a folder that loads without DeepSpeed."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agrepa_fast import UserError, load_model
from agrepa_fast.checkpoints.find import resolve_checkpoint
from agrepa_fast.checkpoints.shard_facts import as_trained
from agrepa_fast.checkpoints.weights import weights_file
from agrepa_fast.cli import main
from agrepa_fast.data.index import load_index

from ..ranks import ROOT, run_training


@pytest.fixture(scope="module")
def exported(baseline, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    main(["export", str(baseline), "--out", str(out)])
    return out


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # importing it raises
from agrepa_fast import load_model
model, config = load_model(sys.argv[1])
print(config.model.dim, model.training, sum(p.numel() for p in model.parameters()))
"""


def test_it_loads_without_deepspeed(exported):
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    count = sum(weights.numel() for weights in load_file(exported / "model.safetensors").values())
    assert done.stdout.split() == ["32", "False", str(count)], done.stderr


def test_it_holds_the_averaged_or_the_live_weights(baseline, exported, tmp_path):
    (checkpoint,) = (baseline / "checkpoints").glob("step*")
    main(["export", str(checkpoint), "--out", str(tmp_path / "live"), "--live"])
    for folder, name in ((exported, "ema"), (tmp_path / "live", "model")):
        wanted = load_file(checkpoint / f"{name}.safetensors")
        torch.testing.assert_close(load_model(folder)[0].state_dict(), wanted, atol=0, rtol=0)
    assert weights_file(tmp_path / "live", live=True).parent == tmp_path / "live"
    with pytest.raises(UserError, match="averaged weights: the live ones"):
        load_model(exported, live=True)
    main(["export", str(tmp_path / "live"), "--out", str(tmp_path / "again")])
    assert weights_file(tmp_path / "again", live=True).parent == tmp_path / "again"


def test_it_says_what_the_weights_were_trained_on(exported, preset):
    facts = json.loads((exported / "export.json").read_text())
    index = json.loads((preset.parent / "index.json").read_text())
    assert facts["step"] == 5
    assert facts["weights"] == "averaged"
    assert facts["shards"]["features"] == index["features"]
    assert facts["shards"]["mel"]["std"] > 0
    assert facts["shards"]["domains"].keys() == {"speech", "audio"}
    for domain, said in facts["shards"]["domains"].items():
        assert said["tokens"]["sha256"] == index["domains"][domain]["tokens"]["sha256"]
        assert said["teacher"]["spec"] == "openai/whisper-large-v3"
        assert said["teacher"]["dim"] == len(said["teacher"]["mean"])
    assert facts["selection"]["layers"].keys() == {"speech", "audio"}


def test_other_shards_are_read_as_those_of_the_training(exported, preset, tmp_path):
    """With their mels scaled alike, and not at all if their token ids mean other sounds."""
    index = load_index(preset.parent)
    facts = json.loads((exported / "export.json").read_text())["shards"]
    content = deepcopy(index.content)
    for entry in content["domains"].values():
        entry["mel"]["sum"] *= 2  # of other recordings
    other = as_trained(replace(index, content=content), exported)
    assert (other.mel_mean, other.mel_std) == (facts["mel"]["mean"], facts["mel"]["std"])
    assert as_trained(index, exported).mel_mean == index.mel_mean
    content["domains"]["audio"]["tokens"]["sha256"] = "0"
    with pytest.raises(UserError, match="its audio tokens are other ids than those"):
        as_trained(replace(index, content=content), exported)
    for number, damaged in enumerate(("[]", '{"shards": 3}', '{"shards": {"domains": {}}}')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "export.json").write_text(damaged)
        with pytest.raises(UserError, match="what it says of its shards is damaged"):
            as_trained(index, tmp_path / str(number))


def test_probe_sample_and_start_from_take_it(exported, tmp_path, capsys, no_pictures):
    main(["sample", str(exported), "--clips", "1", "--out", str(tmp_path / "wavs")])
    assert len(list((tmp_path / "wavs").glob("*.wav"))) == 6
    main(["probe", str(exported), "--measures", "foga,ridge", "--out", str(tmp_path / "probe")])
    assert "5,foga," in (tmp_path / "probe" / "attribution.csv").read_text()
    args = ("--preset", str(exported / "config.yaml"), "run.dir=run", "train.steps=4", "train.lr=1e-12")
    run_training(1, *args, f"train.start_from={exported}", cwd=tmp_path)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step*")
    begun, given = (load_file(folder / "model.safetensors")["out.weight"] for folder in (checkpoint, exported))
    torch.testing.assert_close(begun, given, atol=1e-8, rtol=0)
    assert json.loads((checkpoint / "checkpoint.json").read_text())["run"] is not None


def test_refusals(exported, baseline, tmp_path, capsys):
    for arguments, message in (
        (["export", str(baseline), "--out", str(exported)], "is not empty"),
        (["export", str(tmp_path), "--out", str(tmp_path / "x")], "is no checkpoint"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert resolve_checkpoint(exported) == exported
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in exported.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load_model(broken)
