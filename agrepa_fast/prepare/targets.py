"""The targets and tokens of a teacher as shards hold them: values, name in file names, entry in index.json."""

from functools import partial

import numpy as np

from ..config import DataConfig
from ..tokenizers.base import FrameTokenizer
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


def stored_target(teacher, frames: np.ndarray, seconds: float, rate: float | None) -> np.ndarray:
    """Return a clip's target in fp16: the mean (dim,) of its teacher frames (S, dim), or, with a rate in Hz, the means
    (max(1, round(seconds * rate)), dim) over equal parts of the clip. The product of a mean query and a mean key is the
    mean score of attention between two parts."""
    if rate is None and teacher.start is None:
        return frames.mean(axis=0, dtype=np.float32).astype(np.float16)
    count = 1 if rate is None else max(1, round(seconds * rate))
    place = () if teacher.start is None else (-teacher.start * teacher.rate, seconds * teacher.rate)
    target = resample_frames(frames, count, *place).astype(np.float16)
    return target[0] if rate is None else target


def resample_frames(frames: np.ndarray, count: int, first: float = 0.0, length: float | None = None) -> np.ndarray:
    """Return (count, dim) float32 from frames (S, dim): the means over equal parts of the clip, with each frame
    constant over its time (area interpolation), and the first and last one before and after it.

    first, length: the clip's begin and length, in frames. By default the frames span the clip, so that the mean over
    the clip is theirs."""
    length = len(frames) if length is None else length
    sums = np.zeros((len(frames) + 1, frames.shape[1]))
    np.cumsum(frames, axis=0, dtype=np.float64, out=sums[1:])
    edges = first + np.arange(count + 1) * (length / count)
    whole = np.clip(np.floor(edges).astype(np.int64), 0, len(frames) - 1)
    integral = sums[whole] + (edges - whole)[:, None] * frames[whole]
    return (np.diff(integral, axis=0) * (count / length)).astype(np.float32)


def frame_tokens(teacher, tokenizer: FrameTokenizer, frames: np.ndarray, seconds: float) -> np.ndarray:
    """Return the ids (S,) int32 of a clip's teacher frames, spread over the clip: those of the frames as they are, or,
    of a teacher with a `start`, of the frame in the middle of each of max(1, round(seconds * rate)) equal parts."""
    ids = tokenizer.encode(frames)
    if teacher.start is None:
        return ids
    rate = teacher.rate / tokenizer.stride
    count = max(1, round(seconds * rate))
    middles = (np.arange(count) + 0.5) * (seconds / count)
    return ids[np.clip(np.floor((middles - teacher.start) * rate).astype(np.int64), 0, len(ids) - 1)]


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
