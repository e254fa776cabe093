"""Recordings to clips: decoded, cut once, turned into log-mels; bad ones skipped and counted; some held out.

Which ones are held out depends on all of them, whoever decoded them.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..audio.mel import LogMel
from ..audio.waves import resample
from ..config import DataConfig, MelConfig, values_of
from ..corpora.recordings import Recording
from ..errors import UserError
from .job import Job, work_file, write_work

MIN_PEAK = 1e-4  # a recording that stays below is silent
MAX_BAD_SHARE, MAX_BAD = 0.02, 3  # beyond both the folder is not what was meant


@dataclass(frozen=True)
class Clip:
    """A usable recording and the file of its mel."""

    recording: Recording
    file: Path
    frames: int
    seconds: float


def decode_stage(job: Job, recordings: list[Recording]) -> tuple[list[Clip], list[dict]]:
    """Decode the recordings, each rank its part. Returns all usable clips in the recordings' order, and the others."""
    data = job.data
    settings = list(values_of(MelConfig, data).values())
    folder = job.folder("mel", digest(settings))
    task = partial(_decode_one, data=data, folder=folder, log_mel=LogMel(data))
    own, found = job.ranks.part_of(recordings), []
    with job.stage("decode", len(own)) as stage:
        for name, frames, seconds, reason, computed in ahead(job.pool, task, own):
            found.append((name, frames, seconds, reason))
            stage.done(seconds) if computed else stage.skip()
    clips, skipped = [], []
    every = job.ranks.join_parts(job.ranks.all_gather(found))
    for recording, (name, frames, seconds, reason) in zip(recordings, every, strict=True):
        if reason:
            skipped.append({"name": recording.name, "source": recording.source, "reason": reason})
        else:
            clips.append(Clip(recording, work_file(folder, name), frames, seconds))
    _report_skipped(job, skipped, len(recordings))
    return clips, skipped


def _report_skipped(job: Job, skipped: list[dict], total: int) -> None:
    lines = [f"{entry['source']} ({entry['reason']})" for entry in skipped]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    if (len(lines) > MAX_BAD and len(lines) > MAX_BAD_SHARE * total) or total - len(lines) < 2:
        first = f": {', '.join(lines[:3])}{more}" if lines else ""
        limit = f"at most {MAX_BAD_SHARE:.0%} may be bad and at least 2 must be good"
        raise UserError(
            f"{len(lines)} of {total} {job.domain} recordings cannot be used{first}; {limit}: repair, remove or add "
            "some"
        )
    for line in lines:
        job.say(f"{job.domain}: skipped {line}")


def _decode_one(
    recording: Recording, data: DataConfig, folder: Path, log_mel: LogMel
) -> tuple[str, int, float, str, bool]:
    """(file name, mel frames, seconds, reason for skipping or "", whether the mel was computed now)."""
    name = f"{recording.name}-{digest(recording.fingerprint())}.npz"
    file = work_file(folder, name)
    computed = not file.is_file()
    if computed:
        write_work(file, **_mel_of(recording, data, log_mel))
    with np.load(file, allow_pickle=False) as stored:
        return name, int(stored["frames"]), float(stored["seconds"]), str(stored["reason"]), computed


def _mel_of(recording: Recording, data: DataConfig, log_mel: LogMel) -> dict:
    nothing = {"frames": 0, "seconds": 0.0, "cut": False}
    try:
        wave, rate, cut = _read(recording, data)
    except UserError as error:
        return {**nothing, "reason": str(error).removeprefix(f"{recording.source}: ")}
    seconds = len(wave) / rate
    if seconds < max(data.min_seconds, log_mel.min_samples / data.sample_rate):
        return {**nothing, "reason": f"{seconds:.2f} s are shorter than data.min_seconds={data.min_seconds}"}
    if not np.isfinite(wave).all():
        return {**nothing, "reason": "not finite"}
    if (peak := float(np.abs(wave).max())) < MIN_PEAK:
        return {**nothing, "reason": f"silent, peak {peak:.0e}"}
    wave = _at_rate(wave, rate, data, data.sample_rate)
    mel = log_mel(wave).astype(np.float16)
    return {"frames": len(mel), "seconds": len(wave) / data.sample_rate, "cut": cut, "reason": "", "mel": mel}


def cut_wave(recording: Recording, data: DataConfig, rate: int) -> np.ndarray:
    """The clip at `rate` Hz: the first data.max_seconds from the recording's start on, as loud as recorded."""
    wave, from_rate, _ = _read(recording, data)
    return _at_rate(wave, from_rate, data, rate)


def _read(recording: Recording, data: DataConfig) -> tuple[np.ndarray, int, bool]:
    """The clip at its own rate, that rate, and whether the clip is only a part of the recording."""
    # A little more than is used shows whether something is cut off, without decoding a long file to its end.
    wave, rate = recording.read(data.max_seconds + 0.01)
    limit = round(data.max_seconds * rate)
    return wave[:limit], rate, recording.start > 0 or len(wave) > limit


def _at_rate(wave: np.ndarray, from_rate: int, data: DataConfig, rate: int) -> np.ndarray:
    return resample(wave, from_rate, rate)[: round(data.max_seconds * rate)]


def validation_groups(clips: list[Clip], share: float) -> set[str]:
    """Groups of clips held out: those whose hash is below `share`, and the next ones until they hold that share."""
    groups: dict[str, int] = {}
    for clip in clips:
        groups[clip.recording.split_group] = groups.get(clip.recording.split_group, 0) + 1
    held_out, count = set(), 0
    for group in sorted(groups, key=partial(name_hash, "split"))[: len(groups) - 1]:  # one stays for training
        if name_hash("split", group) / 2**160 >= share and count >= math.ceil(share * len(clips)):
            break
        held_out.add(group)
        count += groups[group]
    return held_out


def ahead(pool: ThreadPoolExecutor, task: Callable, items: Iterable, depth: int = 32) -> Iterator:
    """task(item) of every item, in order, at most `depth` of them computed before they are asked for."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(task, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def name_hash(salt: str, name: str) -> int:
    return int.from_bytes(hashlib.sha1(f"{salt}:{name}".encode()).digest(), "big")


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
