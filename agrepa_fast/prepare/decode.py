"""Recordings to clips: decoded once, cut, resampled for every teacher and tokenizer, turned into log-mels."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..audio.mel import LogMel
from ..audio.waves import resample
from ..config import DataConfig
from ..corpora.recordings import MAX_BAD_SHARE, Recording, too_many_bad
from ..data_config import MelConfig, values_of
from ..errors import UserError
from .job import Job, digest, work_file, write_work
from .passes import read_ahead

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
        with np.load(self.file, allow_pickle=False) as stored:
            wave = stored[f"wave_{rate}"]
        return wave.astype(np.float32) / 2**15 if wave.dtype == np.int16 else wave


class _Decoded(NamedTuple):
    """The facts on a recording that ranks exchange."""

    file: str
    frames: int
    seconds: float
    reason: str  # why it cannot be used, or ""


def decode_recordings(job: Job, recordings: list[Recording], rates: set[int]) -> tuple[list[Clip], list[dict]]:
    """Decode every recording once, each rank its part, and keep its mel, and its waves at `rates` in Hz.

    Returns the usable clips in the recordings' order; and name, source and reason of the others. Raises UserError if
    those are too many. Every rank must call it.
    """
    data, own = job.data, job.ranks.part_of(recordings)
    folder = job.work_folder("mel", [*values_of(MelConfig, data).values(), sorted(rates)])
    task = partial(_decode_once, data=data, rates=rates, folder=folder, log_mel=LogMel(data))
    decoded = []
    with job.stage("decode", len(own)) as stage:
        for one, computed in read_ahead(job.pool, task, own):
            decoded.append(one)
            stage.add(one.seconds) if computed else stage.skip()
    clips, skipped = [], []
    for recording, one in zip(recordings, job.ranks.join_parts(job.ranks.all_gather(decoded)), strict=True):
        if one.reason:
            skipped.append({"name": recording.name, "source": recording.source, "reason": one.reason})
        else:
            clips.append(Clip(recording, work_file(folder, one.file), one.frames, one.seconds))
    _report_skipped(job, skipped, len(recordings))
    return clips, skipped


def _report_skipped(job: Job, skipped: list[dict], total: int) -> None:
    lines = [f"{entry['source']} ({entry['reason']})" for entry in skipped]
    if too_many_bad(len(lines), total):
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        first = f": {', '.join(lines[:3])}{more}" if lines else ""
        limit = f"at most {MAX_BAD_SHARE:.0%} may be bad and at least 2 must be good"
        raise UserError(
            f"{len(lines)} of {total} {job.domain} recordings cannot be used{first}; {limit}: repair, remove or add "
            "some"
        )
    for line in lines:
        job.print(f"{job.domain}: skipped {line}")


def _decode_once(
    recording: Recording, data: DataConfig, rates: set[int], folder: Path, log_mel: LogMel
) -> tuple[_Decoded, bool]:
    """Return the facts on a recording, and whether it was decoded now."""
    name = f"{recording.name}-{digest(recording.fingerprint())}.npz"
    file = work_file(folder, name)
    if computed := not file.is_file():
        write_work(file, **_features(recording, data, rates, log_mel))
    with np.load(file, allow_pickle=False) as stored:
        return _Decoded(name, int(stored["frames"]), float(stored["seconds"]), str(stored["reason"])), computed


def _features(recording: Recording, data: DataConfig, rates: set[int], log_mel: LogMel) -> dict:
    """Return the content of a recording's work file."""
    try:
        wave, rate, cut = _read(recording, data)
    except UserError as error:
        return _unusable(str(error).removeprefix(f"{recording.source}: "))
    seconds = len(wave) / rate
    if seconds < max(data.min_seconds, log_mel.min_samples / data.sample_rate):
        return _unusable(f"{seconds:.2f} s are shorter than data.min_seconds={data.min_seconds}")
    if not np.isfinite(wave).all():
        return _unusable("not finite")
    if (peak := float(np.abs(wave).max())) < _MIN_PEAK:
        return _unusable(f"silent, peak {peak:.0e}")
    at_rate = {to_rate: _resample(wave, rate, data, to_rate) for to_rate in {*rates, data.sample_rate}}
    mel = log_mel(at_rate[data.sample_rate]).astype(np.float16)
    return {
        "frames": len(mel),
        "seconds": len(at_rate[data.sample_rate]) / data.sample_rate,
        "cut": cut,
        "reason": "",
        "mel": mel,
        **{f"wave_{to_rate}": _as_small_as_exact(at_rate[to_rate]) for to_rate in rates},
    }


def _unusable(reason: str) -> dict:
    return {"frames": 0, "seconds": 0.0, "cut": False, "reason": reason}


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
