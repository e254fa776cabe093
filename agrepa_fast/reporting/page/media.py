"""Sounds and pictures as data: URIs, which a page holds in itself."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...audio.mel import LogMel
from ...config import DataConfig

_COLUMNS = 320  # of a mel picture, at most about: it is drawn no wider


def data_uri(content: bytes, kind: str) -> str:
    """Return a data: URI. kind: the media type, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_uri(path: Path) -> str:
    return data_uri(path.read_bytes(), "image/png")


def flac_uri(wave: np.ndarray, rate: int) -> str:
    """Return a wave (samples,) as FLAC in 16 bits: without loss, and every browser plays it."""
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, wave, rate, format="FLAC", subtype="PCM_16")
    return data_uri(content.getvalue(), "audio/flac")


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
