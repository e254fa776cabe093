"""A recording is decoded once in a preparation, and every consumer gets the same wave as from a decode of its own."""

from collections import Counter

import numpy as np
import pytest
import soundfile

from agrepa_fast.audio.mel import LogMel
from agrepa_fast.config_file import load_config
from agrepa_fast.corpora import recordings
from agrepa_fast.corpora.folder import list_folder
from agrepa_fast.data.index import load_index
from agrepa_fast.prepare import roles
from agrepa_fast.prepare.decode import Clip, _features, cut_wave
from agrepa_fast.prepare.job import write_work
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.tokenizers.base import WaveTokenizer, tokens_of_frames

from .test_prepare import read_all, settings, write_corpus
from .test_prepare_ranks import run_threads


class Signs(WaveTokenizer):
    """Two ids, 10 a second, by the sign of the wave; at 24 kHz, a rate that nothing else asks for."""

    codes, rate, sample_rate, identity = 2, 10.0, 24000, {"spec": "s3:signs"}

    def encode(self, waves, texts):
        return [(wave[::2400] > 0).astype(np.int32) for wave in waves]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_recording_is_decoded_once_for_mel_teacher_and_every_tokenizer(whisper, tmp_path, monkeypatch, ranks):
    corpus = write_corpus(tmp_path / "corpus", 12)
    plain = prepare_folder(settings(whisper), corpus, "speech", tmp_path / "plain")
    decoded, decode = Counter(), recordings.decode

    def count(content, name, *part):
        decoded[name] += 1
        return decode(content, name, *part)

    monkeypatch.setattr(recordings, "decode", count)
    monkeypatch.setattr(roles, "load_tokenizer", lambda spec, device: Signs())
    config = settings(whisper, "data.extra_tokens=s3:signs", "data.extra_codebook=2")
    run_threads(ranks, lambda ranks: prepare_folder(config, corpus, "speech", tmp_path / "out", ranks))
    assert set(decoded.values()) == {1}
    assert len(decoded) == 12
    plain = {clip.key: clip for split in read_all(plain).values() for clip in split}
    for split in read_all(load_index(tmp_path / "out")).values():
        for clip in split:
            np.testing.assert_array_equal(clip.mel, plain[clip.key].mel)
            np.testing.assert_array_equal(clip.teacher, plain[clip.key].teacher)
            recording = next(r for r in list_folder(corpus, "speech")[0] if r.name == clip.key)
            [ids] = Signs().encode([cut_wave(recording, config.data, 24000)], [""])
            np.testing.assert_array_equal(clip.tokens2, tokens_of_frames(ids, len(clip.tokens)))


@pytest.mark.parametrize("wave", ["16 bits", "clipped", "float"])
def test_waves_are_kept_exactly(tmp_path, wave):
    """16-bit recordings at the rate of the teacher are kept as int16, all others as they are."""
    values = np.random.default_rng(0).integers(-(2**15), 2**15, 16000) / 2**15
    values[5] = {"16 bits": 0.5, "clipped": 1.0, "float": 1 / 3}[wave]
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype="FLOAT")
    data = load_config("demo").data
    recording = list_folder(tmp_path, "speech")[0][0]
    write_work(tmp_path / "work" / "a.npz", **_features(recording, data, {16000, 8000}, LogMel(data)))
    clip = Clip(recording, tmp_path / "work" / "a.npz", 1, 1.0)
    np.testing.assert_array_equal(clip.wave(16000), values.astype(np.float32))
    np.testing.assert_array_equal(clip.wave(8000), cut_wave(recording, data, 8000))
    with np.load(clip.file) as stored:
        assert stored["wave_16000"].dtype == (np.int16 if wave == "16 bits" else np.float32)
