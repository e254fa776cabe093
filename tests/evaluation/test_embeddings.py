"""Embeddings of clips: the packaged network against figures of its authors' own code, VGGish against its definition,
teachers, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.audio.waves import resample
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.aisfx import load_aisfx
from agrepa_fast.evaluation.embeddings import TeacherEmbedder, load_embedding
from agrepa_fast.evaluation.vggish import Vggish
from agrepa_fast.teachers import load_teacher


def chirp(samples: int, rate: int = 44100) -> np.ndarray:
    """A tone that rises and fades, with short high beeps."""
    t = np.arange(samples) / rate
    beeps = 0.05 * np.sin(2 * np.pi * 6000 * t) * (t % 0.5 < 0.1)
    return (0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) * np.exp(-t) + beeps).astype(np.float32)


# Spectrogram frames -> |vector|, its first three values, and those from the 100th: aisfx 0.1.2 with Essentia 2.1b6.
AISFX = {
    60: (43.0974, (2.3624134, 0.915478, 1.2090553), (0.10374922, 1.75992, 3.0630195)),  # silence fills up a block
    100: (45.271538, (1.9459062, 2.0284932, 0.6677413), (0.09554752, 1.3572769, 3.0630195)),
    200: (41.068096, (1.1375296, 1.9278765, 0.64040655), (0.2802069, 1.0331753, 3.1514635)),  # three blocks
}


@pytest.mark.parametrize("frames", AISFX)
def test_aisfx_gives_the_package_s_own_vectors(frames):
    vector = load_embedding("package:aisfx").embed(chirp((frames - 1) * 1024), 44100)
    length, first, later = AISFX[frames]
    assert vector.shape == (512,)
    assert vector.dtype == np.float64
    assert np.linalg.norm(vector) == pytest.approx(length, rel=1e-4)
    assert vector[:3] == pytest.approx(first, abs=1e-4)
    assert vector[100:103] == pytest.approx(later, abs=1e-4)


def test_aisfx_hears_a_clip_to_its_end():
    """The last block of 130 frames is frames 30 to 130."""
    network, wave = load_aisfx(), torch.from_numpy(chirp(129 * 1024))
    with torch.inference_mode():
        whole = network(wave)
        spectrogram = network.spectrogram(wave)
        network.spectrogram = lambda wave: spectrogram[30:]
        assert torch.allclose(whole[-1:], network(wave), atol=1e-5)
    assert whole.shape == (2, 512)


def test_aisfx_identity():
    embedder = load_embedding("package:aisfx")
    assert embedder.dim == 512
    assert embedder.identity == {
        "spec": "package:aisfx",
        "sha256": "ec7eb3a63d247bdf7add10a7569ee47677830d313615e690dd9012a8f9b22bd0",
        "licence": "CC-BY-4.0",
        "version": "0.1.2",
    }
    wave = chirp(30000, 22050)
    assert np.array_equal(embedder.embed(wave, 22050), embedder.embed(resample(wave, 22050, 44100), 44100))
    with pytest.raises(ValueError, match="not finite"):
        embedder.embed(np.append(wave, np.float32(np.inf)), 22050)


@pytest.fixture(scope="module")
def vggish(tmp_path_factory):
    """(file of random weights, the weights) in torchvggish's format, with a whitening that is not used."""
    torch.manual_seed(0)
    weights = Vggish().state_dict()
    for name, value in weights.items():
        if name.endswith("weight"):
            torch.nn.init.normal_(value, std=value[0].numel() ** -0.5)
    file = tmp_path_factory.mktemp("models") / "vggish.pth"
    torch.save(weights | {"pproc.pca_means": torch.zeros(128, 1)}, file)
    yield file, weights
    file.unlink()  # 288 MB


def test_vggish_is_what_its_definition_says(vggish):
    """Frames of 25 ms every 10 ms, magnitudes in 64 triangles over mel from 125 to 7500 Hz, log(x + 0.01), 96 frames
    per example, values ordered time, band, channel before the linear layers."""
    file, weights = vggish
    wave = chirp(400 + 160 * 220, 16000)  # two examples and a rest
    spectrum = [
        np.abs(np.fft.rfft(wave[n * 160 : n * 160 + 400] * (0.5 - 0.5 * np.cos(np.arange(400) * np.pi / 200)), 512))
        for n in range(192)
    ]
    mel = 1127 * np.log(1 + np.arange(257) * 31.25 / 700)
    edges = np.linspace(*(1127 * np.log(1 + np.array([125, 7500]) / 700)), 66)
    filters = np.stack([np.interp(mel, edges[n : n + 3], [0, 1, 0]) for n in range(64)], axis=1)
    x = torch.from_numpy(np.log(np.stack(spectrum) @ filters + 0.01).astype(np.float32)).view(2, 1, 96, 64)
    for number in (0, 3, 6, 8, 11, 13):
        x = F.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1).relu()
        x = F.max_pool2d(x, 2) if number in (0, 3, 8, 13) else x
    x = x.permute(0, 2, 3, 1).reshape(2, -1)
    for number in (0, 2, 4):
        x = F.linear(x, weights[f"embeddings.{number}.weight"], weights[f"embeddings.{number}.bias"])
        x = x.relu() if number < 4 else x
    embedder = load_embedding(f"vggish:{file}")
    vector = embedder.embed(wave, 16000)
    assert vector == pytest.approx(x.mean(dim=0).numpy(), abs=1e-5 * float(x.std()))
    assert (vector < 0).any()
    assert embedder.embed(wave[:100], 16000).shape == (embedder.dim,)
    assert embedder.identity["licence"] is None


def test_any_teacher_is_an_embedding(whisper):
    teacher, embedder = load_teacher(f"{whisper}@1"), load_embedding(f"{whisper}@1")
    wave = chirp(20000, 22050)
    frames = teacher.frames([resample(wave, 22050, teacher.sample_rate)])[0]
    assert embedder.embed(wave, 22050) == pytest.approx(frames.mean(axis=0), abs=1e-6)
    assert embedder.dim == teacher.dim
    assert embedder.identity["sha256"] == teacher.identity["sha256"]
    assert embedder.identity != load_embedding(f"{whisper}@2").identity
    assert json.loads(json.dumps(embedder.identity)) == embedder.identity


def test_a_frame_that_hangs_over_the_end_counts_for_its_part_of_the_clip():
    """Of CLAP, 3.2 frames per second."""
    frames = np.arange(1, 9, dtype=np.float32)[:, None] ** 2
    teacher = SimpleNamespace(dim=1, rate=3.2, sample_rate=48000, start=0.0, identity={"sha256": "0", "start": 0.0})
    teacher.frames = lambda waves: [frames[: -(-len(wave) // 15000)] for wave in waves]
    embedder = TeacherEmbedder(teacher, "clap")
    assert embedder.embed(np.zeros(96000, np.float32), 48000) == pytest.approx((91 + 0.4 * 49) / 6.4)
    assert embedder.embed(np.zeros(75000, np.float32), 48000) == pytest.approx(55 / 5)
    assert embedder.embed(np.zeros(600, np.float32), 48000) == pytest.approx(1)
    assert embedder.identity["start"] == 0.0  # figures that are kept are of the same mean


def test_what_is_no_embedding_is_refused(vggish, tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for spec, words in {
        "package:aisf": "embedding 'package:aisf': did you mean 'package:aisfx'?",
        "package:whisper-bas@3": "did you mean 'package:whisper-base'?",
        "package:aisfx@3": "leave @3 out",
        "vggish:nowhere.pth": "no file nowhere.pth",
        f"vggish:{tmp_path}/empty.pth": "does not hold VGGish's weights",
        f"vggish:{tmp_path}/other.pth": "does not hold VGGish's weights",
    }.items():
        with pytest.raises(UserError) as error:
            load_embedding(spec)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
