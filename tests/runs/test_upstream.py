"""Weight files of other packages, in and out."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from agrepa_fast import AudioDiT, UserError
from agrepa_fast.checkpoints.upstream import other_settings, read_tensors, start_from_upstream
from agrepa_fast.cli import main
from agrepa_fast.config_file import load_config
from agrepa_fast.models.voicebox import Voicebox

from ..attribution.test_peers import voicebox_package
from ..ranks import run_training
from ..testing import N_MELS, attribution, write_small_shards

SIZES = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "token_dim": 12, "registers": 2}
VOCAB = 12  # of the small shards
FINE_TUNE = ("train.steps=3", "train.lr=1e-12", "probe.start_step=1", "probe.warmup_steps=1", "align.k=1")


@pytest.fixture(scope="module")
def voicebox_preset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("voicebox")
    preset = write_small_shards(folder / "shards")
    lines = [line for line in preset.read_text().splitlines() if line and not line.startswith("model:")]
    options = "options: {dim: 16, depth: 2, heads: 2, dim_head: 8, token_dim: 12, registers: 2}"
    (folder / "voicebox.yaml").write_text("\n".join([f"model: {{backbone: voicebox, {options}}}", *lines]) + "\n")
    return folder / "voicebox.yaml"


def their_wrapper():
    """voicebox-pytorch's model inside what its trainer saves."""
    package = voicebox_package()
    torch.manual_seed(5)
    model = package.VoiceBox(
        num_cond_tokens=VOCAB,
        dim_in=N_MELS,
        dim_cond_emb=12,
        dim=16,
        depth=2,
        dim_head=8,
        heads=2,
        num_register_tokens=2,
    )
    return package.ConditionalFlowMatcherWrapper(voicebox=model)


def test_a_fine_tune_begins_with_their_weights_and_ends_as_their_file(voicebox_preset, tmp_path):
    wrapper = their_wrapper()
    torch.save({"model": wrapper.state_dict(), "step": 3}, tmp_path / "theirs.pt")
    args = ("--preset", str(voicebox_preset), *FINE_TUNE, "train.start_from=theirs.pt")
    output = run_training(1, *args, "--ds_config", "zero0.json", "run.dir=one", cwd=tmp_path)
    assert "tensors of theirs.pt, read as voicebox-pytorch 0.5.0's VoiceBox (MIT)" in output
    run_training(2, *args, "--ds_config", "zero3.json", "run.dir=two", cwd=tmp_path)
    assert "1" in {row[0] for row in attribution(tmp_path / "one")}, "the layers are measured at once"
    for run in ("one", "two"):
        assert json.loads((tmp_path / run / "summary.json").read_text())["selection"].startswith("speech L")
        out = tmp_path / f"{run}.pt"
        main(["export", str(tmp_path / run), "--upstream", "--out", str(out)])
        exported = torch.load(out, weights_only=True)["model"]
        torch.testing.assert_close(exported, dict(wrapper.state_dict()), atol=1e-7, rtol=0)
        their_wrapper().load_state_dict(exported)  # strictly


def test_averaged_weights_are_taken_before_live_ones(tmp_path):
    live, averaged = {"a": torch.zeros(2)}, {"a": torch.ones(2), "step": torch.tensor(7)}
    torch.save({"model_state_dict": live, "ema_model_state_dict": averaged, "update": 7}, tmp_path / "run.pt")
    assert read_tensors(tmp_path / "run.pt")["a"].tolist() == [1, 1]
    torch.save(live, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "old.pt")["a"].tolist() == [0, 0]
    save_file(averaged, tmp_path / "file.safetensors")
    assert set(read_tensors(tmp_path / "file.safetensors")) == {"a", "step"}


class Planted:
    def __reduce__(self):
        return print, ("code of a stranger ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda file: torch.save({"model": {"a": torch.ones(1)}, "x": Planted()}, file), "Python objects"),
        (lambda file: file.write_bytes(b"not a file of torch.save"), "Python objects|no whole file"),
        (lambda file: torch.save({"model": {"a": 3}}, file), "no weights by name"),
        (lambda file: torch.save([torch.ones(1)], file), "no weights by name"),
        (lambda file: None, "No such file"),
        (
            lambda file: (torch.save(their_wrapper().state_dict(), file), file.write_bytes(file.read_bytes()[:-900])),
            "no whole",
        ),
    ],
    ids=["objects", "no pickle", "numbers", "no names", "missing", "cut short"],
)
def test_other_files_are_refused(tmp_path, capsys, content, message):
    file = tmp_path / "theirs.pt"
    content(file)
    with pytest.raises(UserError, match=message) as refused:
        read_tensors(file)
    assert "theirs.pt" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "stranger" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_no_bytes_are_a_traceback(zipped, tmp_path):
    content = {"model": {"a": torch.ones(9), "b": torch.zeros(2, 3)}}
    torch.save(content, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole, draw, refused = (tmp_path / "whole.pt").read_bytes(), random.Random(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place, length = draw.randrange(len(content) + 1), draw.choice((1, 4, 100))
            content[place : place + length] = draw.choice((b"", bytes(length), draw.randbytes(length)))
        (tmp_path / "damaged.pt").write_bytes(content)
        try:
            assert read_tensors(tmp_path / "damaged.pt")
        except UserError:
            refused += 1
    assert refused > 50


def test_weights_of_another_model_are_refused_by_key(tmp_path):
    theirs = their_wrapper().state_dict()
    for change, message in (
        (lambda state: state.pop("voicebox.to_pred.weight"), r"to_pred\.weight is missing, not \(8, 16\)"),
        (
            lambda state: state.update({"voicebox.extra.weight": torch.ones(1)}),
            r"extra\.weight is \(1,\), not none of its weights",
        ),
        (
            lambda state: state.update({"voicebox.null_cond": torch.ones(9)}),
            r"null_cond is \(9,\), not \(8,\)",
        ),
    ):
        state = dict(theirs)
        change(state)
        torch.save({"model": state}, tmp_path / "other.pt")
        with pytest.raises(UserError, match=rf"other\.pt: not the weights of this Voicebox, {message}"):
            start_from_upstream(Voicebox(N_MELS, VOCAB, **SIZES), tmp_path / "other.pt")


def test_one_line_where_a_model_has_no_package(preset, baseline, tmp_path, capsys):
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    args = ("--preset", str(preset), "run.dir=run", f"train.start_from={tmp_path}/weights.safetensors")
    output = run_training(1, *args, cwd=tmp_path, wanted=2)
    assert "AudioDiT reads no other package's weights" in output
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as ended:
        main(["export", str(baseline), "--upstream", "--out", str(tmp_path / "out.pt")])
    assert ended.value.code == 2
    assert "AudioDiT writes no other package's weights" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_an_export_overwrites_nothing_and_has_the_suffix_that_the_package_reads(voicebox_preset, tmp_path, capsys):
    run_training(
        1, "--preset", str(voicebox_preset), "align.strategy=none", "train.steps=1", "run.dir=run", cwd=tmp_path
    )
    (tmp_path / "there.pt").write_text("mine")
    for out, message in (("there.pt", "exists: choose a new file"), ("a.safetensors", r"reads .pt files")):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(tmp_path / "run"), "--upstream", "--out", str(tmp_path / out)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"
    assert not (tmp_path / "a.safetensors").exists()
    main(["export", str(tmp_path / "run"), "--upstream", "--live", "--out", str(tmp_path / "new" / "live.pt")])
    exported = torch.load(tmp_path / "new" / "live.pt", weights_only=True)["model"]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step*")
    assert torch.equal(
        exported["voicebox.to_pred.weight"], load_file(checkpoint / "model.safetensors")["to_pred.weight"]
    )


def test_a_run_with_other_mels_or_noise_than_a_package_is_warned():
    model = SimpleNamespace(upstream_settings={"data.normalize": False, "flow.sigma": 1.0})
    assert other_settings(model, load_config("f5-v1")) is None
    assert "are of data.normalize=False, and" in other_settings(model, load_config("f5-v1", ["data.normalize=true"]))
    warning = other_settings(model, load_config("f5-v1", ["data.normalize=true", "flow.sigma=0.5"]))
    assert "are of data.normalize=False and flow.sigma=1.0, and" in warning
    assert other_settings(AudioDiT, load_config("demo")) is None
