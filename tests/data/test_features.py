"""Decoding, resampling and log-mels against values worked out here by hand."""

import av
import numpy as np
import pytest
import soundfile

from agrepa_fast.audio import waves
from agrepa_fast.audio.mel import LogMel, frame_count
from agrepa_fast.audio.waves import decode, resample
from agrepa_fast.config import DataConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError

CONFIGS = {"release": DataConfig(), "hifigan": load_config("demo").data}


def sine(rate, seconds=1.0, hertz=440.0, peak=0.5):
    return (peak * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def dominant_hertz(wave, rate):
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return spectrum.argmax() * rate / len(wave)


def mel_filters(data):
    """(n_fft / 2 + 1, n_mels) triangles on the htk or Slaney mel scale, written from their definitions."""

    def to_mel(f):
        if data.mel_scale == "htk":
            return 2595 * np.log10(1 + f / 700)
        return np.where(f < 1000, 3 * f / 200, 15 + 27 * np.log(np.maximum(f, 1) / 1000) / np.log(6.4))

    def to_hertz(m):
        if data.mel_scale == "htk":
            return 700 * (10 ** (m / 2595) - 1)
        return np.where(m < 15, 200 * m / 3, 1000 * np.exp((m - 15) * np.log(6.4) / 27))

    low, high = to_mel(np.array([0.0, data.f_max]))
    corners = to_hertz(np.linspace(low, high, data.n_mels + 2))
    bins = np.linspace(0, data.sample_rate / 2, data.n_fft // 2 + 1)[:, None]
    left, top, right = corners[:-2], corners[1:-1], corners[2:]
    filters = np.maximum(0, np.minimum((bins - left) / (top - left), (right - bins) / (right - top)))
    return filters * (2 / (right - left) if data.mel_norm == "slaney" else 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_mel_frame_equals_a_plain_dft(name):
    data = CONFIGS[name]
    wave = np.random.default_rng(0).standard_normal(5001).astype(np.float32) * 0.1 + sine(data.sample_rate)[:5001]
    mel = LogMel(data)(wave)
    edge = data.n_fft // 2 if data.center else (data.n_fft - data.hop_length) // 2
    padded = np.pad(wave.astype(np.float64), edge, mode="reflect")
    n = np.arange(data.n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / data.n_fft)  # periodic Hann
    dft = np.exp(-2j * np.pi * np.arange(data.n_fft // 2 + 1)[:, None] * n / data.n_fft)
    for frame in (0, 1, 7, len(mel) - 1):  # reflected edges and the middle
        piece = padded[frame * data.hop_length :][: data.n_fft] * window
        expected = np.log(np.maximum(np.abs(dft @ piece) @ mel_filters(data), 1e-5))
        np.testing.assert_allclose(mel[frame], expected, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_frame_count_is_that_of_the_mel(name):
    data = CONFIGS[name]
    log_mel = LogMel(data)
    # one window; around multiples of the hop; odd lengths; the cut length of the demo
    for samples in (1024, 1025, 1279, 1280, 1281, 5003, 22049, 48510, 48511):
        assert log_mel(np.zeros(samples, np.float32)).shape == (frame_count(samples, data), data.n_mels)


def test_mel_keeps_loudness_and_has_a_floor():
    log_mel = LogMel(CONFIGS["hifigan"])
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32) * 0.1
    np.testing.assert_allclose(log_mel(wave) - log_mel(wave / 2), np.log(2), atol=1e-4)
    np.testing.assert_allclose(log_mel(np.zeros(8000, np.float32)), np.log(1e-5), atol=1e-6)


def test_mel_refuses_less_than_a_window():
    with pytest.raises(ValueError, match="1023 samples"):
        LogMel(CONFIGS["release"])(np.zeros(1023, np.float32))


# suffix, rate, tolerance of the waveform (lossy codecs: only the tone is compared)
FORMATS = [
    ("wav", 11127, 1e-4),
    ("flac", 44101, 1e-4),
    ("mp3", 22050, None),
    ("ogg", 37800, None),
    ("opus", 24000, None),
    ("WAV", 8000, 1e-4),
]


@pytest.mark.parametrize(("suffix", "rate", "tolerance"), FORMATS)
def test_decodes_stereo_at_odd_rates_to_mono(tmp_path, suffix, rate, tolerance):
    left, right = sine(rate, peak=0.6), sine(rate, peak=0.2)
    path = tmp_path / f"tone.{suffix}"
    form = {"opus": {"format": "OGG", "subtype": "OPUS"}}.get(suffix, {})
    soundfile.write(path, np.stack([left, right], axis=1), rate, **form)
    wave, found = decode(path, path.name)
    assert found == rate
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert abs(len(wave) - rate) <= 0.06 * rate  # mp3 pads to whole frames
    assert dominant_hertz(wave, rate) == pytest.approx(440, abs=2)
    middle = slice(len(wave) // 4, 3 * len(wave) // 4)
    assert np.abs(wave[middle]).max() == pytest.approx(0.4, rel=0.05)  # the mean of 0.6 and 0.2
    if tolerance:
        np.testing.assert_allclose(wave, (left + right) / 2, atol=tolerance)
    np.testing.assert_array_equal(decode(path.read_bytes(), path.name)[0], wave)


def test_decodes_a_part(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.9, 0.9, 8000).astype(np.float32)
    path = tmp_path / "noise.wav"
    soundfile.write(path, wave, 8000, subtype="FLOAT")
    np.testing.assert_array_equal(decode(path, path.name, start=0.25, seconds=0.5)[0], wave[2000:6000])
    np.testing.assert_array_equal(decode(path, path.name, start=0.9, seconds=0.5)[0], wave[7200:])
    assert len(decode(path, path.name, start=2.0)[0]) == 0


def test_decodes_g722(tmp_path):
    path = tmp_path / "tone.g722"
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        pcm = (sine(16000) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    wave, rate = decode(path, path.name)
    assert rate == 16000
    assert len(wave) == 16000
    assert dominant_hertz(wave, rate) == pytest.approx(440, abs=2)
    assert np.sqrt((wave[4000:12000] ** 2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)
    np.testing.assert_array_equal(decode(path, path.name, start=0.5, seconds=0.25)[0], wave[8000:12000])


@pytest.mark.parametrize("name", ["broken.wav", "broken.mp3"])
def test_undecodable_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"this is no audio at all")
    with pytest.raises(UserError, match=f"{name}: cannot be decoded"):
        decode(path, name)


@pytest.mark.parametrize(
    ("from_rate", "to_rate", "tolerance"),
    # 22254 Hz: an old rate whose ratio is rounded; 44101 Hz: taken as 2 x 22050, so the phase drifts
    [
        (44100, 24000, 1e-3),
        (48000, 22050, 1e-3),
        (8000, 22050, 2e-3),
        (22254, 22050, 1e-3),
        (44101, 22050, 0.04),
    ],
)
def test_resample_keeps_the_tone(from_rate, to_rate, tolerance):
    wave = resample(sine(from_rate), from_rate, to_rate)
    assert abs(len(wave) - to_rate) <= 1
    expected = sine(to_rate, seconds=1.1)[: len(wave)]
    np.testing.assert_allclose(wave[200:-200], expected[200:-200], atol=tolerance)  # the filter sees zeros at the ends
    assert dominant_hertz(wave, to_rate) == pytest.approx(440, abs=0.6)


@pytest.mark.parametrize("from_rate", [1, 7, 1009, 2039, 3712, 4001, 5999, 44101, 999_983])
def test_no_rate_makes_a_large_kernel(from_rate, monkeypatch):
    terms = []

    def identity(from_term, to_term):
        terms.append((from_term, to_term))
        return lambda wave: wave

    monkeypatch.setattr(waves, "_resampler", identity)
    resample(np.zeros(9, np.float32), from_rate, 22050)
    [(from_term, to_term)] = terms
    assert from_term * to_term <= 2**24
    assert to_term / from_term == pytest.approx(22050 / from_rate, rel=5e-4)


def test_resample_returns_equal_rates_unchanged():
    wave = sine(16000)
    assert resample(wave, 16000, 16000) is wave
