"""BEATs: a small random model in the published format, against speechbrain's own forward pass."""

import sys

import numpy as np
import pytest
import torch

from agrepa_fast.audio.waves import import_torchaudio
from agrepa_fast.errors import UserError
from agrepa_fast.teachers import load_teacher

import_torchaudio()  # before speechbrain

# Less than a step (2800 samples), 0.5 s, a step that ends in the last sample, one sample less, 2 s.
LENGTHS = (300, 8000, 2800 + 5 * 2560, 2799 + 5 * 2560, 32000)
WAVES = [(np.random.default_rng(i).standard_normal(n) * 0.1).astype(np.float32) for i, n in enumerate(LENGTHS)]
SETTINGS = {"embed_dim": 16, "encoder_layers": 3, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48}
SETTINGS |= {"encoder_attention_heads": 2, "conv_pos": 8, "conv_pos_groups": 4, "relative_position_embedding": True}
SETTINGS |= {"gru_rel_pos": True, "deep_norm": True, "num_buckets": 32, "max_distance": 80, "finetuned_model": True}
SETTINGS |= {"predictor_class": 7, "mask_prob": 0.8}  # and one that is of the training only
WEIGHT_NORM = "encoder.pos_conv.0.parametrizations.weight.original"  # torch's newer names of weight_g and weight_v


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(file as microsoft/unilm's, speechbrain's model of it, which returns all layers)"""
    beats = pytest.importorskip("speechbrain.lobes.models.beats", reason="pip install 'agrepa_fast[beats]'")
    torch.manual_seed(0)
    model = beats.BEATs.__new__(beats.BEATs)
    with pytest.MonkeyPatch.context() as patch:
        settings = beats.BEATsConfig(SETTINGS)
        patch.setattr(beats, "BEATsConfig", lambda cfg: settings)
        model.__init__()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    old = {f"{WEIGHT_NORM}0": "encoder.pos_conv.0.weight_g", f"{WEIGHT_NORM}1": "encoder.pos_conv.0.weight_v"}
    weights = {old.get(name, name): value for name, value in model.state_dict().items()}
    file = tmp_path_factory.mktemp("beats") / "BEATs_tiny.pt"
    torch.save({"cfg": SETTINGS, "model": weights}, file)
    return file, beats.BEATs(str(file), output_all_hiddens=True)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= tolerance * np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize("layer", [None, 1])
def test_frames_are_speechbrains_own(checkpoint, layer):
    file, model = checkpoint
    teacher = load_teacher(f"beats:{file}" if layer is None else f"beats:{file}@{layer}")
    assert (teacher.dim, teacher.rate, teacher.sample_rate) == (32, 6.25, 16000)
    assert teacher.start == teacher.identity["start"] == 0.0075  # the middle of 16 windows is at 0.0875 s
    for wave, steps in zip(WAVES[1:], (3, 6, 5, 12), strict=True):
        hidden = model(torch.from_numpy(wave)[None], torch.ones(1))[0][layer or 3]  # (patches, 1, dim)
        patches = hidden[:, 0].numpy().reshape(steps, 8, 32)
        close(teacher.frames([wave])[0], patches.mean(axis=1))


def test_frames_do_not_depend_on_the_batch(checkpoint):
    teacher = load_teacher(f"beats:{checkpoint[0]}@2")
    alone = [teacher.frames([wave])[0] for wave in WAVES]
    assert [len(frames) for frames in alone] == [1, 3, 6, 5, 12]
    teacher.room = 10**9  # one padded batch, as on a GPU
    for together, one in zip(teacher.frames(WAVES), alone, strict=True):
        close(together, one)


def test_half_precision_and_identity(checkpoint):
    half, full = (load_teacher(f"beats:{checkpoint[0]}@2", dtype=dtype) for dtype in ("fp16", "fp32"))
    assert half.name == "beats_tiny_l2"
    assert half.identity == full.identity | {"precision": "fp16"}
    assert full.identity["sha256"] == load_teacher(f"beats:{checkpoint[0]}").identity["sha256"]
    half.room = 10**9
    for ours, exact in zip(half.frames(WAVES), full.frames(WAVES), strict=True):
        close(ours, exact, 0.03)
        assert np.abs(ours - exact).max() > 1e-5


def refused(spec: object) -> str:
    with pytest.raises(UserError) as error:
        load_teacher(str(spec))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    file = tmp_path / "broken.pt"
    assert "no file" in refused(f"beats:{file}")
    file.write_bytes(checkpoint[0].read_bytes()[:-1000])
    assert "cannot be read" in refused(f"beats:{file}")
    torch.save({"model": {}}, file)
    assert "'cfg'" in refused(f"beats:{file}")
    assert "layers 1 to 3" in refused(f"beats:{checkpoint[0]}@4")


def test_a_checkpoint_cannot_run_code(checkpoint, tmp_path):
    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    content = torch.load(checkpoint[0], weights_only=True)
    torch.save(content | {"cfg": SETTINGS | {"dropout": Opens()}}, tmp_path / "evil.pt")
    assert "cannot be read as tensors" in refused(f"beats:{tmp_path / 'evil.pt'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder_layers": 2}, "Unexpected key"),
        ({"encoder_layers": 1_000_000_000}, "layers.999999999.fc1.weight is missing"),
        ({"encoder_ffn_embed_dim": 64}, "cfg says"),
        ({"embed_dim": "16"}, "cfg['embed_dim'] is '16'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_weights_are_refused(checkpoint, tmp_path, changed, message):
    content = torch.load(checkpoint[0], weights_only=True)
    torch.save(content | {"cfg": SETTINGS | changed}, tmp_path / "other.pt")
    assert message in refused(f"beats:{tmp_path / 'other.pt'}")


def test_without_speechbrain_the_remedy_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "speechbrain.lobes.models.beats", None)
    assert "pip install speechbrain" in refused(f"beats:{checkpoint[0]}")
