"""Recordings to clips: decoded once, cut, resampled for every teacher and tokenizer, turned into log-mels."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..audio.mel import LogMel
from ..audio.waves import SilentError, resample, wave_fault
from ..config import DataConfig
from ..corpora.recordings import Recording
from ..data_config import MelConfig, values_of
from ..errors import UserError
from .job import Job, digest, read_work, work_file, write_work
from .passes import read_ahead
from .skipped import BAD, LONG, SHORT, SILENT, LeftOut

_MIN_PEAK = 1e-4  # a recording that stays below is silent


@dataclass(frozen=True)
class Clip:
    """A usable recording, and the work file that holds its mel and its waves."""

    recording: Recording
    file: Path
    frames: int  # of the mel
    seconds: float

    @property
    def name(self) -> str:
        return self.recording.name

    def wave(self, rate: int) -> np.ndarray:
        """Return the clip (samples,) float32 at `rate` Hz, one of the rates that it was decoded for."""
        (wave,) = read_work(self.file, f"wave_{rate}").values()
        return wave.astype(np.float32) / 2**15 if wave.dtype == np.int16 else wave


def decoded_from(clips: Iterable[Clip], data: DataConfig) -> list:
    """Return what the results of clips depend on: their recordings, and the settings that cut them and make mels."""
    return [*values_of(MelConfig, data).values(), *(clip.file.name for clip in clips)]


class _Decoded(NamedTuple):
    """The facts on a recording that ranks exchange."""

    file: str
    frames: int
    seconds: float
    left_out: LeftOut | None


def decode_recordings(job: Job, recordings: list[Recording], rates: set[int]) -> tuple[list[Clip], dict[str, LeftOut]]:
    """Decode every recording once, each rank its part, and keep its mel, and its waves at `rates` in Hz.

    Returns the usable clips in the recordings' order; and by name why the others are left out. Every rank must call it.
    """
    data, own = job.data, job.ranks.part_of(recordings)
    # The number changes with the way a recording is read and checked.
    folder = job.work_folder("mel", [*values_of(MelConfig, data).values(), sorted(rates), 3])
    task = partial(_decode_once, data=data, rates=rates, folder=folder, log_mel=LogMel(data))
    decoded = []
    with job.stage("decode", len(own)) as stage:
        for one, computed in read_ahead(job.pool, task, own):
            decoded.append(one)
            stage.add(one.seconds) if computed else stage.skip()
    clips, left_out = [], {}
    for recording, one in zip(recordings, job.ranks.join_parts(job.ranks.all_gather(decoded)), strict=True):
        if one.left_out:
            left_out[recording.name] = one.left_out
        else:
            clips.append(Clip(recording, work_file(folder, one.file), one.frames, one.seconds))
    return clips, left_out


def _decode_once(
    recording: Recording, data: DataConfig, rates: set[int], folder: Path, log_mel: LogMel
) -> tuple[_Decoded, bool]:
    """Return the facts on a recording, and whether it was decoded now."""
    try:
        name = f"{recording.name}-{digest(recording.fingerprint())}.npz"
    except UserError as error:  # it was there when the recordings were listed
        return _Decoded("", 0, 0.0, LeftOut(BAD, str(error))), True
    file = work_file(folder, name)
    if computed := not file.is_file():
        write_work(file, **_features(recording, data, rates, log_mel))
    stored = read_work(file, "kind", "reason", "frames", "seconds")
    left_out = LeftOut(str(stored["kind"]), str(stored["reason"])) if str(stored["kind"]) else None
    return _Decoded(name, int(stored["frames"]), float(stored["seconds"]), left_out), computed


def _features(recording: Recording, data: DataConfig, rates: set[int], log_mel: LogMel) -> dict:
    """Return the content of a recording's work file."""
    try:
        wave, rate, cut = _read(recording, data)
    except UserError as error:
        kind = SILENT if isinstance(error, SilentError) else BAD
        return _unusable(kind, str(error).removeprefix(f"{recording.source}: "))
    if cut and data.long == "skip":
        return _unusable(LONG, f"longer than data.max_seconds={data.max_seconds}")
    if fault := _fault(wave, rate, data, log_mel):
        return _unusable(*fault)
    at_rate = {to_rate: _resample(wave, rate, data, to_rate) for to_rate in {*rates, data.sample_rate}}
    if len(at_rate[data.sample_rate]) < log_mel.min_samples:  # of a rate that is resampled by a near ratio
        return _unusable(SHORT, "shorter than a window of the mel")
    mel = log_mel(at_rate[data.sample_rate]).astype(np.float16)
    if not np.isfinite(mel).all():
        return _unusable(BAD, "its mel is not finite")
    return {
        "frames": len(mel),
        "seconds": len(at_rate[data.sample_rate]) / data.sample_rate,
        "cut": cut,
        "kind": "",
        "reason": "",
        "mel": mel,
        **{f"wave_{to_rate}": _as_small_as_exact(at_rate[to_rate]) for to_rate in rates},
    }


def _fault(wave: np.ndarray, rate: int, data: DataConfig, log_mel: LogMel) -> LeftOut | None:
    """Return why a wave cannot be used, if so."""
    seconds = len(wave) / rate if rate else 0.0
    if len(wave) == 0:
        return LeftOut(BAD, "no samples: the file is empty, or its header says so")
    if seconds < max(data.min_seconds, log_mel.min_samples / data.sample_rate):
        return LeftOut(SHORT, f"{seconds:.2f} s are shorter than data.min_seconds={data.min_seconds}")
    if fault := wave_fault(wave):
        return LeftOut(BAD, fault)
    if (peak := float(np.abs(wave).max())) < _MIN_PEAK:
        return LeftOut(SILENT, f"silent, peak {peak:.0e}")
    return None


def _unusable(kind: str, reason: str) -> dict:
    return {"frames": 0, "seconds": 0.0, "kind": kind, "reason": reason}


def _as_small_as_exact(wave: np.ndarray) -> np.ndarray:
    """Return a wave as int16 if that loses nothing, as for 16-bit recordings at their own rate: half the space."""
    scaled = wave * np.float32(2**15)
    rounded = np.clip(scaled, -(2**15), 2**15 - 1).astype(np.int16)
    return rounded if np.array_equal(rounded, scaled) else wave


def cut_wave(recording: Recording, data: DataConfig, rate: int) -> np.ndarray:
    """Decode a recording: its first data.max_seconds, at `rate` Hz, as loud as recorded."""
    wave, from_rate, _ = _read(recording, data)
    return _resample(wave, from_rate, data, rate)


def _read(recording: Recording, data: DataConfig) -> tuple[np.ndarray, int, bool]:
    """Return the clip at its own rate, that rate, and whether the clip is only a part of the recording."""
    # A little more than is used shows whether something is cut off, without decoding a long file to its end.
    wave, rate = recording.read(data.max_seconds + 0.01)
    limit = round(data.max_seconds * rate)
    return wave[:limit], rate, recording.start > 0 or len(wave) > limit


def _resample(wave: np.ndarray, from_rate: int, data: DataConfig, rate: int) -> np.ndarray:
    return resample(wave, from_rate, rate)[: round(data.max_seconds * rate)]
