"""Recordings made ready for a blind test: one rate, one loudness, and the anchor."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...audio.waves import decode, resample, wave_fault
from ...errors import UserError

LOUDNESS = -23.0  # LUFS (EBU R 128)
ANCHOR_HZ = 3500  # BS.1534's low anchor
_SHORTEST = 0.4  # seconds, one block of BS.1770's gate
_PEAK = 0.98
_TAPS = 0.02  # seconds of the anchor's filter


def read_waves(files: Mapping[str, Path]) -> tuple[dict[str, np.ndarray], int]:
    """Return name -> wave (samples,), all at the highest of the recordings' rates, and that rate. Raises UserError for
    a recording that cannot be read or used, is shorter than 0.4 s or has no room for the anchor."""
    decoded = {name: decode(path, str(path)) for name, path in files.items()}
    highest = max(rate for _, rate in decoded.values())
    for name, (wave, rate) in decoded.items():
        if fault := wave_fault(wave):
            raise UserError(f"{files[name]}: {fault}; leave it out")
        if len(wave) < _SHORTEST * rate:
            raise UserError(f"{files[name]} has {len(wave) / rate:.2f} s: a loudness needs {_SHORTEST} s; leave it out")
    if highest <= 2 * ANCHOR_HZ:
        raise UserError(f"{next(iter(files.values()))} has {highest} Hz: an anchor of {ANCHOR_HZ} Hz needs more")
    return {name: resample(wave, rate, highest) for name, (wave, rate) in decoded.items()}, highest


def low_passed(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return the anchor of a wave: its part below 3.5 kHz, without delay."""
    from scipy.signal import fftconvolve, firwin

    taps = firwin(2 * int(_TAPS * rate / 2) + 1, ANCHOR_HZ, fs=rate)
    return fftconvolve(wave, taps, mode="same").astype(np.float32)


def loudness(wave: np.ndarray, rate: int, name: str) -> float:
    """Return the integrated loudness in LUFS (ITU-R BS.1770-4, by pyloudnorm: torchaudio's takes a hundred times as
    long where its own library is missing). Raises UserError for silence."""
    import pyloudnorm

    value = float(pyloudnorm.Meter(rate).integrated_loudness(wave)) if wave.any() else -np.inf
    if not np.isfinite(value):
        raise UserError(f"{name} is silent: its loudness cannot be set; leave it out of the test")
    return value


def common_loudness(waves: Mapping[str, np.ndarray], measured: Mapping[str, float]) -> float:
    """Return the loudness that all waves get: -23 LUFS, or less if one of them would clip."""
    room = [
        measured[name] + 20 * np.log10(_PEAK / max(float(np.abs(wave).max()), 1e-9)) for name, wave in waves.items()
    ]
    return min(LOUDNESS, *room)


def at_loudness(wave: np.ndarray, measured: float, wanted: float) -> np.ndarray:
    return (wave * 10 ** ((wanted - measured) / 20)).astype(np.float32)
