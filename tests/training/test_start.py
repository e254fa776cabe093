"""train.start_from: what a resume makes of it, and the runs that a new one does not start with."""

import json
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from agrepa_fast.checkpoints.shard_facts import shard_facts
from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.data.index import Index, load_index
from agrepa_fast.errors import UserError
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.models.backbone import Backbone
from agrepa_fast.models.cosyvoice3 import CosyVoice3
from agrepa_fast.models.cosyvoice_unet import CosyVoice1
from agrepa_fast.models.f5 import F5
from agrepa_fast.models.voicebox import Voicebox
from agrepa_fast.training import start

from ..attribution.test_peers import INSTALL

RUN = "runs/warm/checkpoints/step00000003"  # as stored: of a command that said runs/warm


@pytest.mark.parametrize(
    ("stored", "given", "same"),
    [
        (RUN, "runs/warm", True),
        (RUN, "runs/warm/", True),
        (RUN, "{here}/runs/../runs/warm", True),
        ("{here}/" + RUN, "runs/warm", True),
        ("{here}/" + RUN, "~/runs/warm", True),
        (RUN, "link", True),  # to runs/warm
        (RUN, "runs/warm/checkpoints/latest", True),
        (RUN, RUN + "/", True),
        (RUN, "runs/warm/checkpoints/step00000006", False),
        (RUN, "runs", False),
        (RUN, "runs/other", False),
        (RUN, "null", False),
        ("null", "runs/warm", False),
        ("checkpoints/step00000003", ".", True),
        ("theirs.pt", "{here}/theirs.pt", True),
        ("theirs.pt", "ours.pt", False),
        ("theirs.pt", "latest", False),
        ("1e5/checkpoints/step00000003", "1e5", True),  # names, not numbers
        ("1e5/checkpoints/step00000003", "100000", False),
        ("exported", "./exported", True),
    ],
)
def test_a_resume_takes_the_start_that_its_run_was_begun_with(stored, given, same, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "from_rank_0", lambda find: find())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs/warm")  # nothing is there any more
    stored, given = (f"train.start_from={text.format(here=tmp_path)}" for text in (stored, given))
    save_config(load_config("demo", [stored]), tmp_path / "config.yaml")
    config = load_config("demo", [given, "train.steps=7000"])
    wanted = load_config("demo", [stored, "train.steps=7000"]) if same else config
    assert start.keep_start(config, tmp_path) == wanted


class Wide(Backbone):
    """A user's class."""

    neutral_options = frozenset({"chatty"})

    def __init__(self, n_mels, vocab, kernels=(3, 5), chatty=False):
        super().__init__()


VOICEBOX, COSYVOICE1, COSYVOICE3 = (f"model.backbone={name}" for name in ("voicebox", "cosyvoice1", "cosyvoice3"))
WIDE = "model.backbone=mine:Wide"


def check(model: type[Backbone], theirs: list[str], ours: list[str], folder: Path, index: Index | None = None) -> None:
    save_config(load_config("demo", theirs), folder / "config.yaml")
    return start.check_start(load_config("demo", ours), model, index, folder)


@pytest.mark.parametrize(
    ("model", "theirs", "ours", "said"),
    [
        (AudioDiT, [VOICEBOX], [], "backbone is voicebox, and this run's is audio_dit: set model.backbone=voicebox"),
        (AudioDiT, ["model.gelu=tanh"], [], "model.gelu is tanh, and this run's is erf: set model.gelu=tanh"),
        (Voicebox, ["model.options.heads=2"], [], "heads is 2, and this run's is 16: set model.options.heads=2"),
        (Voicebox, [], ["model.options.heads=2"], "heads is 16, and this run's is 2: set model.options.heads=16"),
        (Voicebox, [], ["model.options.position=alibi"], "position is rotary, and this run's is alibi: set"),
        (Voicebox, ["model.options.qk_norm=false"], [], "false, and this run's is true: set .*qk_norm=false"),
        (CosyVoice1, [], ["model.options.encoder={attention_heads: 2}"], "null, .*: set model.options.encoder=null"),
        (CosyVoice3, ["model.options.look_ahead=2"], [], "set model.options.look_ahead=2"),
        (Wide, [], ["model.options.kernels=[3,7]"], r"set model.options.kernels=\[3, 5\]"),
        (Wide, [], ["model.options.other=1"], "is not set, and this run's is 1: leave model.options.other out"),
        (Wide, ["model.options.other=1"], [], "is 1, and this run's is not set: set model.options.other=1"),
    ],
)  # fmt: skip
def test_a_network_that_computes_something_else_is_refused(model, theirs, ours, said, tmp_path):
    """Names and shapes of the weights do not tell."""
    backbone = {Voicebox: [VOICEBOX], CosyVoice1: [COSYVOICE1], CosyVoice3: [COSYVOICE3], Wide: [WIDE]}.get(model, [])
    with pytest.raises(UserError, match=said) as refusal:
        check(model, [*backbone, *theirs], [*backbone, *ours], tmp_path)
    assert str(refusal.value).startswith(f"train.start_from={tmp_path}: its model.")


@pytest.mark.skipif(find_spec("f5_tts") is None, reason=INSTALL)
def test_f5_v0_and_v1_do_not_start_from_each_other(tmp_path):
    for theirs, ours, remedy in (("f5-v0", "f5-v1", "1"), ("f5-v1", "f5-v0", "null"), ("e2", "f5-v0", ".*")):
        save_config(load_config(theirs), tmp_path / "config.yaml")
        with pytest.raises(UserError, match=f"set model.options.[a-z_]+={remedy}$"):
            start.check_start(load_config(ours), F5, None, tmp_path)
    options = ["model.options.fused=false", "model.options.checkpoint_activations=true", "model.options.qk_norm=null"]
    save_config(load_config("f5-v1", options), tmp_path / "config.yaml")
    assert start.check_start(load_config("f5-v1"), F5, None, tmp_path) is None


@pytest.mark.parametrize(
    ("model", "backbone", "given"),
    [
        (Voicebox, VOICEBOX, ["model.options.dropout=0.2", "model.options.qk_norm=true", "model.options.ff_mult=4"]),
        (CosyVoice1, COSYVOICE1, ["model.options.encoder={dropout_rate: 0.2}", "model.options.layers=blocks"]),
        (CosyVoice3, COSYVOICE3, ["model.options.streaming=0", "model.options.chunk=25"]),
        (Wide, WIDE, ["model.options.chatty=true", "model.options.kernels=[3,5]"]),
        (AudioDiT, "model.backbone=audio_dit", ["model.dropout=0.2", "model.init=release", "flow.times=logit_normal"]),
    ],
)
def test_settings_that_change_nothing_of_the_trained_weights_may_differ(model, backbone, given, tmp_path):
    assert check(model, [backbone], [backbone, *given], tmp_path) is None
    assert check(model, [backbone, *given], [backbone], tmp_path) is None


def test_other_mels_and_noise_are_warned_of_and_other_ids_refused(preset, tmp_path):
    index = load_index(preset.parent)
    (tmp_path / "shards.json").write_text(json.dumps(shard_facts(index)))
    assert check(AudioDiT, [], [], tmp_path, index) is None
    said = check(AudioDiT, ["flow.sigma=1", "data.f_max=7000"], [], tmp_path, index)
    assert said.startswith(
        f"warning: train.start_from={tmp_path}: its weights are of flow.sigma=1.0 and data.f_max=7000.0"
    )
    said = check(AudioDiT, ["data.normalize=false"], [], tmp_path, index)
    assert said.endswith("are of data.normalize=false, and this run's are not")
    content = deepcopy(index.content)
    for entry in content["domains"].values():
        entry["mel"]["sum"] += 0.1 * entry["mel"]["frames"] * index.n_mels  # louder recordings
    said = check(AudioDiT, [], [], tmp_path, replace(index, content=content))
    assert f"are of mels of mean {index.mel_mean:.3g} and deviation" in said
    assert check(AudioDiT, [], [], tmp_path, index) is None
    content["domains"]["speech"]["tokens"]["sha256"] = "0"  # fitted anew
    with pytest.raises(UserError, match="its speech tokens are other ids than those"):
        check(AudioDiT, [], [], tmp_path, replace(index, content=content))
