"""Decode recordings, and resample their waves."""

import math
import os
import stat
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..torchaudio_import import import_torchaudio as import_torchaudio
from ..torchaudio_import import make_torchaudio_importable as make_torchaudio_importable
from .decoders import DecodeError, NoAudioError, read_pyav, read_soundfile

# Of copies of a recording beside each other, the one whose suffix comes first is taken: see `Walk.recordings`.
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
MORE_SUFFIXES = (
    *(".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".caf", ".dsf", ".eac3", ".g722", ".gsm"),
    *(".m4a", ".m4b", ".mka", ".mp2", ".mpc", ".oga", ".ra", ".rf64", ".snd", ".sph", ".spx", ".tta", ".voc", ".w64"),
    *(".wave", ".weba", ".wma", ".wv", ".3gp", ".avi", ".flv", ".mkv", ".mov", ".mp4", ".webm"),
)
AUDIO_SUFFIXES = (*SOUNDFILE_SUFFIXES, *MORE_SUFFIXES)
MAX_PEAK = 10.0  # mixes reach 2 or 3, integers stored as floats hundreds
_WITHOUT_HEADER = {".g722": "g722", ".gsm": "gsm"}  # FFmpeg's names
# Bounds of the resampling kernel: 44101 -> 22050 Hz taken exactly would need 4 GB, 2039 -> 22050 Hz 1.4 GB.
_MAX_RATIO_TERM = 2048
_MAX_KERNEL = 2**24  # values, numerator x denominator


class SilentError(UserError):
    """A video has no sound track."""


def decode(
    source: str | Path | bytes, name: str, start: float = 0.0, seconds: float | None = None
) -> tuple[np.ndarray, int]:
    """Return a recording's wave (samples,) float32 mono, the mean of its channels, and its rate in Hz.

    `source` is a path or the file's bytes. The content decides on the format, not `name`, the name in messages; except
    for .g722 and .gsm, which have no header. `start` and `seconds` select a part. libsndfile reads first, then FFmpeg
    if libsndfile refuses the recording, finds it empty, as a stream whose header has no length, or would stop before
    its end, as in joined files. Raises UserError with the reasons of both if the recording cannot be decoded, and
    SilentError for a video without a sound track.
    """
    if not isinstance(source, bytes):
        _check_file(source, name)
    if demuxer := _WITHOUT_HEADER.get(os.path.splitext(name)[1].lower()):  # noqa: PTH122
        readers = {"PyAV": partial(read_pyav, demuxer=demuxer)}
    else:
        readers = {"soundfile": read_soundfile, "PyAV": read_pyav}
    empty, reasons = None, []
    for library, read in readers.items():
        try:
            wave, rate = read(source, start, seconds)
        except NoAudioError as error:
            raise SilentError(f"{name}: {error}") from error
        except DecodeError as error:
            reasons.append(f"{library}: {error}")
            continue
        if len(wave) or start:
            return wave, rate
        empty = empty or (wave, rate)
    if empty:
        return empty
    raise UserError(f"{name}: cannot be decoded ({'; '.join(reasons)}); remove it or convert it to wav")


def wave_fault(wave: np.ndarray) -> str:
    """Return why a wave cannot be used: samples that are not finite, or far outside of [-1, 1]. "" if it can be."""
    if not np.isfinite(wave).all():
        return "not finite"
    peak = float(np.abs(wave).max(initial=0))
    return f"peak {peak:.5g}, not in [-1, 1]: integers stored as floats, or damaged" if peak > MAX_PEAK else ""


def _check_file(path: str | Path, name: str) -> None:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - `path` may be a str
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(mode):  # opening a pipe waits for its writer
        raise UserError(f"{name}: is no regular file")


def resample(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Return a wave (samples,) float32 at `to_rate` Hz, (ceil(samples * to_rate / from_rate),), by windowed sinc.

    Exact for usual rates. The ratio of an odd one such as 44101 Hz becomes the nearest one of small numbers, at most
    0.05 % or a cent off.
    """
    ratio = Fraction(to_rate, from_rate).limit_denominator(_MAX_RATIO_TERM)
    if ratio.numerator * ratio.denominator > _MAX_KERNEL:  # from below 6 kHz to 24 kHz
        ratio = ratio.limit_denominator(math.isqrt(int(_MAX_KERNEL / ratio)))
    if ratio == 1:
        return wave
    return _resampler(ratio.denominator, ratio.numerator)(torch.from_numpy(wave)).numpy()


@lru_cache(maxsize=32)
def _resampler(from_rate: int, to_rate: int) -> torch.nn.Module:
    return import_torchaudio().transforms.Resample(from_rate, to_rate)
