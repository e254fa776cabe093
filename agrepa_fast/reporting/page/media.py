"""Sounds and pictures as data: URIs, which a page holds in itself."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...audio.mel import LogMel
from ...audio.waves import resample
from ...config import DataConfig

_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_COLUMNS = 320  # of a mel picture, at most about: it is drawn no wider


def data_uri(content: bytes, kind: str) -> str:
    """Return a data: URI. kind: the media type, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_uri(path: Path) -> str:
    return data_uri(path.read_bytes(), "image/png")


def flac_uri(wave: np.ndarray, rate: int) -> str:
    """Return a wave (samples,) as FLAC in 16 bits: without loss. Play it from its start: Chromium never ends a seek
    into the last 0.3 s."""
    return _encoded(wave, rate, "audio/flac", {"format": "FLAC", "subtype": "PCM_16"})


def mp3_uri(wave: np.ndarray, rate: int) -> str:
    """Return a wave (samples,) as MP3 of the best variable rate, about 90 kbit/s: half of FLAC, and browsers seek in it
    everywhere."""
    if rate not in _MP3_RATES:
        higher = min((one for one in _MP3_RATES if one > rate), default=max(_MP3_RATES))
        wave, rate = resample(wave, rate, higher), higher
    form = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.0}
    return _encoded(wave, rate, "audio/mpeg", form)


def _encoded(wave: np.ndarray, rate: int, kind: str, form: dict) -> str:
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, wave, rate, **form)
    return data_uri(content.getvalue(), kind)


def log_mel(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return a log-mel (T, 80) of any wave, for a picture: T is at most about 320."""
    hop = max(256, len(wave) // _COLUMNS)
    window = max(1024, 1 << (hop - 1).bit_length())
    sizes = {"n_fft": window, "hop_length": hop, "center": False}
    data = replace(DataConfig(), sample_rate=rate, n_mels=80, f_max=float(min(8000, rate // 2)), **sizes)
    return LogMel(data)(np.pad(wave, (0, max(0, window - len(wave)))))


def mel_uri(mel: np.ndarray, scale: np.ndarray) -> str:
    """Return a log-mel as a picture, low bins below. scale: the log-mel whose extremes have the darkest and the
    brightest colour."""
    from matplotlib.image import imsave

    content = io.BytesIO()
    imsave(content, mel.T, cmap="magma", vmin=scale.min(), vmax=scale.max(), origin="lower", format="png")
    return data_uri(content.getvalue(), "image/png")
