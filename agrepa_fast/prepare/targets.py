"""The targets of a teacher as shards hold them: values, name in file names, entry in index.json."""

import numpy as np

from ..config import DataConfig
from .passes import compute_each


def teacher_frames(teacher, waves: list[np.ndarray]) -> list[np.ndarray | str]:
    """Return the teacher's frames (frames, dim) fp16 per wave; or the reason why a wave cannot be used, if it gives
    none, or values that fp16 cannot hold."""
    return [_as_stored(teacher, frames) for frames in compute_each(f"teacher {teacher.name}", teacher.frames, waves)]


def _as_stored(teacher, frames: np.ndarray | str) -> np.ndarray | str:
    if isinstance(frames, str):
        return frames
    with np.errstate(over="ignore"):
        stored = frames.astype(np.float16)
    if len(stored) == 0:
        return f"teacher {teacher.name} gives no frames"
    return stored if np.isfinite(stored).all() else f"teacher {teacher.name} gives values that fp16 cannot hold"


def stored_target(frames: np.ndarray, seconds: float, rate: float | None) -> np.ndarray:
    """Return a clip's target in fp16: the mean (dim,) of its teacher frames (S, dim), or, with a rate in Hz, the means
    (max(1, round(seconds * rate)), dim) over equal parts of the clip."""
    if rate is None:
        return frames.mean(axis=0, dtype=np.float32).astype(np.float16)
    return resample_frames(frames, max(1, round(seconds * rate))).astype(np.float16)


def resample_frames(frames: np.ndarray, count: int) -> np.ndarray:
    """Return (count, dim) float32 from frames (S, dim). Both span the clip; each result is the mean over its part of
    it, with the frames constant over their time (area interpolation), so that the mean over the clip is kept."""
    sums = np.zeros((len(frames) + 1, frames.shape[1]))
    np.cumsum(frames, axis=0, dtype=np.float64, out=sums[1:])
    edges = np.arange(count + 1) * (len(frames) / count)
    whole = np.minimum(edges.astype(np.int64), len(frames) - 1)
    integral = sums[whole] + (edges - whole)[:, None] * frames[whole]
    return (np.diff(integral, axis=0) * (count / len(frames))).astype(np.float32)


def target_name(teacher, rate: float | None) -> str:
    """Return the name of a teacher's targets in file names: `whisper_base`, at 12.5 frames per second
    `whisper_base_12p5hz`."""
    return teacher.name if rate is None else f"{teacher.name}_{rate:g}hz".replace(".", "p")


def teacher_entry(teacher, spec: str, data: DataConfig, mean: np.ndarray, files: dict | None) -> dict:
    """Return the entry of a teacher in index.json. files: its sidecars by shard, None if shards hold its targets."""
    entry = {"spec": spec, "dim": teacher.dim, "rate": data.teacher_rate, "identity": teacher.identity}
    return {**entry, "mean": mean.tolist(), "files": files}
