"""Decode recordings, and resample their waves."""

import io
import sys
import types
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError

SOUNDFILE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
_MAX_RATIO_TERM = 2048  # bounds the resampling kernel: 44101 -> 22050 Hz taken exactly would need 4 GB


def import_torchaudio():
    """Return torchaudio, also beside a CPU build of torch. Call it before importing a library that imports torchaudio:
    transformers, speechbrain, s3tokenizer, vocos."""
    if torch.version.cuda is None and "torchaudio" not in sys.modules:
        # The wheel is a CUDA build, whose native part fails to load without libc10_cuda. The parts in use are pure
        # Python, so a stub takes its place.
        stub = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
        stub._IS_ALIGN_AVAILABLE = False
        stub.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stub
    import torchaudio

    return torchaudio


def decode(
    source: str | Path | bytes, name: str, start: float = 0.0, seconds: float | None = None
) -> tuple[np.ndarray, int]:
    """Return a recording's wave (samples,) float32 mono, the mean of its channels, and its rate in Hz.

    `source` is a path or the file's bytes. `name` is its file name: PyAV decodes .g722, which has no header to tell it
    by, and soundfile the others (wav, flac, mp3, ogg, opus). `start` and `seconds` select a part. Raises UserError if
    it cannot be decoded.
    """
    if name.lower().endswith(".g722"):
        return _decode_g722(source, name, start, seconds)
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            rate = file.samplerate
            file.seek(min(round(start * rate), file.frames))
            samples = -1 if seconds is None else round(seconds * rate)
            channels = file.read(samples, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{name}: cannot be decoded ({error.error_string}); remove it or convert it to wav") from error
    return channels.mean(axis=1, dtype=np.float32), rate


def _decode_g722(source: str | Path | bytes, name: str, start: float, seconds: float | None) -> tuple[np.ndarray, int]:
    import av

    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), format="g722") as container:
            rate = container.streams.audio[0].rate
            pieces = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]  # mono, 16-bit
    except av.error.FFmpegError as error:
        raise UserError(f"{name}: cannot be decoded ({error.strerror}); remove it or convert it to wav") from error
    wave = np.concatenate(pieces).astype(np.float32) / 32768 if pieces else np.zeros(0, np.float32)
    first = round(start * rate)
    return wave[first : None if seconds is None else first + round(seconds * rate)], rate


def resample(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Return a wave (samples,) float32 at `to_rate` Hz, (ceil(samples * to_rate / from_rate),), by windowed sinc.

    Exact for usual rates. The ratio of an odd one such as 44101 Hz becomes the nearest one of small numbers, at most
    0.05 % or a cent off.
    """
    ratio = Fraction(to_rate, from_rate).limit_denominator(_MAX_RATIO_TERM)
    if ratio == 1:
        return wave
    return _resampler(ratio.denominator, ratio.numerator)(torch.from_numpy(wave)).numpy()


@lru_cache(maxsize=32)
def _resampler(from_rate: int, to_rate: int) -> torch.nn.Module:
    return import_torchaudio().transforms.Resample(from_rate, to_rate)
