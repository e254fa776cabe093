"""The targets of a teacher as shards hold them: values, name in file names, entry in index.json."""

from functools import partial

import numpy as np

from ..config import DataConfig
from .passes import compute_each


def teacher_frames(teacher, waves: list[np.ndarray], attention: int | None = None) -> list[np.ndarray | str]:
    """Return the teacher's frames (frames, dim) fp16 per wave; or the reason why a wave cannot be used, if it gives
    none, or values that fp16 cannot hold. attention: data.teacher_attention; each frame's queries and keys follow it.
    """
    compute = partial(teacher.frames_with_attention, layers=attention) if attention else teacher.frames
    return [_as_stored(teacher, frames) for frames in compute_each(f"teacher {teacher.name}", compute, waves)]


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
    (max(1, round(seconds * rate)), dim) over equal parts of the clip. The product of a mean query and a mean key is the
    mean score of attention between two parts."""
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


def target_name(teacher, data: DataConfig) -> str:
    """Return the name of a teacher's targets in file names: `whisper_base`, at 12.5 frames per second
    `whisper_base_12p5hz`, with queries and keys of one layer `whisper_base_12p5hz_qk1`."""
    rate = "" if data.teacher_rate is None else f"_{data.teacher_rate:g}hz".replace(".", "p")
    return teacher.name + rate + (f"_qk{data.teacher_attention}" if data.teacher_attention else "")


def attention_shape(teacher, data: DataConfig) -> tuple[int, ...] | None:
    """Return (layers, 2, heads, width), the queries and keys that are stored with a frame; None: none are. Raises
    UserError if the teacher cannot tell them."""
    return teacher.attention_shape(data.teacher_attention, data.max_seconds) if data.teacher_attention else None


def teacher_entry(teacher, spec: str, data: DataConfig, mean: np.ndarray, files: dict | None) -> dict:
    """Return the entry of a teacher in index.json. files: its sidecars by shard, None if shards hold its targets."""
    entry = {"spec": spec, "dim": teacher.dim, "rate": data.teacher_rate, "identity": teacher.identity}
    if shape := attention_shape(teacher, data):
        entry["attention"] = list(shape)
    return {**entry, "mean": mean.tolist(), "files": files}
