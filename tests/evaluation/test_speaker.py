"""Resemblyzer against figures of its authors' own code, x-vector models against transformers, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.speaker import load_speaker, similarity
from agrepa_fast.torchaudio_import import import_torchaudio

from ..data.audio_families import FAMILIES
from .test_embeddings import chirp

import_torchaudio()  # before transformers

# (samples at 16 kHz, gain) -> three values of the unit vector by their places: Resemblyzer 0.1.4 with librosa 0.11,
# without its voice activity detector.
RESEMBLYZER = {
    (12_000, 1): {243: 0.2561402, 20: 0.25167435, 9: 0.23782201},  # filled up with silence
    (25_600, 0.01): {45: 0.23637989, 9: 0.20367363, 237: 0.20350116},  # raised to the usual level
    (37_500, 1): {20: 0.20906006, 66: 0.20297225, 34: 0.19796318},  # the second window too little covered
    (60_000, 1): {83: 0.20031336, 133: 0.19060822, 220: 0.18151706},  # three windows
}


@pytest.fixture(scope="module")
def resemblyzer():
    return load_speaker("package:resemblyzer")


@pytest.mark.parametrize(("clip", "expected"), RESEMBLYZER.items())
def test_resemblyzer_gives_the_package_s_own_vectors(resemblyzer, clip, expected):
    samples, gain = clip
    vector = resemblyzer.embed(chirp(samples, 16000) * np.float32(gain), 16000)
    vector /= np.linalg.norm(vector)
    assert vector.shape == (resemblyzer.dim,)
    assert {place: vector[place] for place in expected} == pytest.approx(expected, abs=1e-5)


def test_resemblyzer_of_silence_and_its_identity(resemblyzer):
    assert np.isfinite(resemblyzer.embed(np.zeros(20_000, np.float32), 22050)).all()
    assert resemblyzer.identity == {
        "spec": "package:resemblyzer",
        "sha256": "cc5df7eb9b8f1effadcf99983a904615f00ef75eceb6f11db3d090d0b8dd5a96",
        "licence": "Apache-2.0",
        "version": "0.1.4",
    }


@pytest.fixture(scope="module")
def xvector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "xvector"
    sizes = {"tdnn_dim": [16, 16, 24], "tdnn_kernel": [5, 3, 1], "tdnn_dilation": [1, 2, 1], "xvector_output_dim": 12}
    family = FAMILIES["wavlm"]
    replace(family, model="WavLMForXVector", config=family.config | sizes, encoder="wavlm").save(folder)
    return folder


def test_xvector_models_of_transformers(xvector):
    from transformers import AutoFeatureExtractor, WavLMForXVector

    speaker, wave = load_speaker(str(xvector)), chirp(30_000, 16000)
    features = AutoFeatureExtractor.from_pretrained(xvector)(wave, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        expected = WavLMForXVector.from_pretrained(xvector).eval()(**features).embeddings[0].numpy()
    assert np.abs(expected).max() > 1e-3
    assert speaker.embed(wave, 16000) == pytest.approx(expected, abs=1e-6)
    assert speaker.embed(wave[:20], 16000).shape == (speaker.dim,) == (12,)
    assert speaker.identity == load_speaker(str(xvector)).identity
    assert speaker.identity["spec"] == str(xvector)


def test_similarity_is_the_cosine():
    assert similarity(np.array([3.0, 4.0]), np.array([6.0, 8.0])) == pytest.approx(1)
    assert similarity(np.array([3.0, 4.0]), np.array([4.0, -3.0])) == pytest.approx(0)
    assert similarity(np.array([1.0, 0.0]), np.array([-1.0, 1.0])) == pytest.approx(-(0.5**0.5))
    assert similarity(np.zeros(2), np.ones(2)) == 0


def test_what_tells_no_speakers_apart_is_refused(xvector, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from transformers import BertConfig, WavLMModel

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    BertConfig(hidden_size=8).save_pretrained(tmp_path / "bert")
    WavLMModel.from_pretrained(xvector).save_pretrained(tmp_path / "headless")
    (tmp_path / "headless" / "preprocessor_config.json").write_bytes(
        (xvector / "preprocessor_config.json").read_bytes()
    )
    for spec, words in {
        "package:resemblizer": "metrics.speaker=package:resemblizer: did you mean 'package:resemblyzer'?",
        "microsoft/wavlm-base-plus-sv": "metrics.speaker=microsoft/wavlm-base-plus-sv cannot be loaded",
        f"{tmp_path}/bert": "is a 'bert' model",
        f"{tmp_path}/headless": "its weights lack",
        f"{tmp_path}/nothing/here": "no such folder",
    }.items():
        with pytest.raises(UserError) as error:
            load_speaker(spec)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
