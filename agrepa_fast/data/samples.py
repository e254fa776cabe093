"""One clip: its features in memory, and as the members of a shard."""

import io
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .index import Index, Shard

KINDS = (  # of faults
    *("missing", "unreadable", "checksum", "truncated", "corrupt"),  # of shards and their members
    *("missing_key", "dtype", "length", "not_finite", "tokens", "text"),  # of clips
)
_DESCRIBED = ("domain", "text", "labels", "frames", "seconds", "cut", "source", "licence")  # the fields of <key>.json
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|][a-zA-Z]\d+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \}\s*"
)


class ClipError(Exception):
    """A clip that cannot be used. kind: one of KINDS; member: the file in the shard, "" for the shard as a whole;
    reason: one line."""

    def __init__(self, kind: str, member: str, reason: str):
        super().__init__(kind, member, reason)
        self.kind, self.member, self.reason = kind, member, reason

    def __str__(self) -> str:
        return f"{self.member}: {self.reason}" if self.member else self.reason


@dataclass
class Sample:
    """One clip. mel (T, n_mels) fp16 natural log, T = `frames`; tokens (S,) int32; tokens2 (S,) int32, one for every
    token, if the shards have them; teacher (dim,) or (frames, dim) fp16; attention (frames, layers, 2, heads, width)
    fp16, queries and keys of these frames, if the shards have them."""

    key: str
    domain: str
    text: str
    labels: tuple[str, ...]
    frames: int
    seconds: float
    cut: bool  # the clip is a part of its recording, `text` that of the whole
    source: str
    licence: str
    mel: np.ndarray
    tokens: np.ndarray
    teacher: np.ndarray
    tokens2: np.ndarray | None = None
    attention: np.ndarray | None = None
    speaker: np.ndarray | None = None  # (dim,) fp32, if the shards have them
    text_ids: np.ndarray | None = None  # (N,) int64, if the run takes text; not stored

    @property
    def pooled(self) -> np.ndarray:
        """The teacher's vector, or the mean of its frames, (dim,) float32."""
        return pooled(self.teacher)


def pooled(target: np.ndarray) -> np.ndarray:
    """Return a stored target, (dim,) or (frames, dim), as one vector, (dim,) float32: the mean over time."""
    return target.astype(np.float32) if target.ndim == 1 else target.mean(axis=0, dtype=np.float32)


def split_target(
    target: np.ndarray, dim: int, attention: tuple[int, ...] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the frames (frames, dim) of a stored target, and their queries and keys (frames, *attention)."""
    if attention is None:
        return target, None
    return target[:, :dim], target[:, dim:].reshape(len(target), *attention)


def sample_members(sample: Sample, teacher: str) -> dict:
    """Return the members of a sample: "__key__", and suffix -> content. teacher: the name of its target."""
    members = {
        "__key__": sample.key,
        "json": json.dumps({name: getattr(sample, name) for name in _DESCRIBED}, ensure_ascii=False).encode(),
        "mel.npy": npy(sample.mel),
        "tokens.npy": npy(sample.tokens),
    }
    if sample.tokens2 is not None:
        members["tokens2.npy"] = npy(sample.tokens2)
    if sample.speaker is not None:
        members["speaker.npy"] = npy(sample.speaker)
    target = sample.teacher
    if sample.attention is not None:
        target = np.concatenate((target, sample.attention.reshape(len(target), -1)), axis=1)
    return members | {f"{teacher}.npy": npy(target)}


def npy(array: np.ndarray) -> bytes:
    """Return the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_sample(members: dict, shard: Shard, index: Index) -> Sample:
    """Return the sample of some members, checked against the index. Raises ClipError."""
    key, teacher = members["__key__"], index.teacher(shard.domain)
    member = f"{key}.json"

    def check(right: bool, kind: str, reason: str) -> None:
        if not right:
            raise ClipError(kind, member, reason)

    def array(suffix: str, dtype: type) -> np.ndarray:
        nonlocal member
        member = f"{key}.{suffix}"
        values = parse_npy(members[suffix])
        check(values.dtype == dtype, "dtype", f"{values.dtype} {values.shape} is not {np.dtype(dtype)}")
        return values

    try:
        described = json.loads(bytes(members["json"]))
        described = {name: described[name] for name in _DESCRIBED}
        frames, (first, end) = described["frames"], index.token_range(shard.domain)
        mel = array("mel.npy", np.float16)
        shape = (frames, index.n_mels)
        check(mel.shape == shape, "length", f"{mel.shape} is not {shape}")
        check(frames <= shard.bucket, "length", f"{frames} frames are more than the {shard.bucket} of its bucket")
        check(_finite(mel), "not_finite", "not finite")
        tokens = array("tokens.npy", np.int32)
        check(tokens.ndim == 1 and len(tokens) > 0, "length", f"{tokens.shape} is no row of ids")
        check(first <= tokens.min() and tokens.max() < end, "tokens", f"ids outside {first} to {end - 1}")
        tokens2 = None
        if (vocab := index.extra_vocab) is not None:
            tokens2 = array("tokens2.npy", np.int32)
            check(tokens2.shape == tokens.shape, "length", f"{tokens2.shape} is not {tokens.shape}, as tokens")
            check(tokens2.min() >= 0 and tokens2.max() < vocab, "tokens", f"ids outside 0 to {vocab - 1}")
        speaker = None
        if (dim := index.speaker_dim) is not None:
            speaker = array("speaker.npy", np.float32)
            check(speaker.shape == (dim,), "length", f"{speaker.shape} is not ({dim},)")
            check(bool(np.isfinite(speaker).all()), "not_finite", "not finite")
        target = array(f"{teacher.name}.npy", np.float16)
        if teacher.rate is None:
            check(target.shape == (teacher.dim,), "length", f"{target.shape} is not ({teacher.dim},)")
        else:
            width = teacher.dim + (math.prod(teacher.attention) if teacher.attention else 0)
            right = target.shape[1:] == (width,) and len(target) > 0
            check(right, "length", f"{target.shape} is not (frames, {width})")
        check(_finite(target), "not_finite", "not finite")
        target, attention = split_target(target, teacher.dim, teacher.attention)
        member, domain = f"{key}.json", described["domain"]
        check(domain == shard.domain, "corrupt", f"domain {domain!r} in a shard of {shard.domain}")
        described["labels"] = tuple(described["labels"])
        arrays = {"mel": mel, "tokens": tokens, "tokens2": tokens2, "speaker": speaker}
        arrays |= {"teacher": target, "attention": attention}
        sample = Sample(key=key, **arrays, **described)
        if index.text is not None:
            sample.text_ids = ids = index.text.encode(sample.text)
            check(len(ids) <= frames, "text", f"{len(ids)} ids of text for {frames} frames: it is not the clip's alone")
        return sample
    except KeyError as error:
        raise ClipError("missing_key", "", f"{key} lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ClipError("corrupt", "", f"{member} is damaged ({error})") from error


def parse_npy(content: bytes | memoryview) -> np.ndarray:
    """Return the array of an .npy of version 1.0. Raises ValueError.

    np.load would allocate whatever size a header claims, and its parser, `ast`, raises SystemError where two threads
    parse at once, on Python before 3.11.8 (cpython issue 106905).
    """
    start = 10 + int.from_bytes(content[8:10], "little")
    if bytes(content[:8]) != b"\x93NUMPY\x01\x00" or len(content) < start:
        raise ValueError("no .npy of version 1.0")
    shape, fortran, dtype = _npy_header(bytes(content[10:start]))
    if dtype.hasobject:
        raise ValueError("Python objects")
    count = math.prod(shape)
    if len(content) - start != count * dtype.itemsize:
        raise ValueError(f"{len(content) - start} bytes are not {shape} of {dtype}")
    values = np.frombuffer(content, dtype, count, start)
    return values.reshape(shape, order="F" if fortran else "C").copy()  # or every clip would keep its whole shard


@lru_cache(maxsize=8192)  # parsing again for each clip takes longer than all its other work
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    match = _NPY_HEADER.fullmatch(header)
    if not match:
        raise ValueError("its header is not one that NumPy writes for plain numbers")
    dtype, fortran, shape = (part.decode() for part in match.groups())
    return tuple(int(size) for size in shape.split(",") if size.strip()), fortran == "True", np.dtype(dtype)


def _finite(values: np.ndarray) -> bool:
    """Return whether all float16 values are finite: the others have all exponent bits set."""
    return int((values.view(np.uint16) & 0x7C00).max(initial=0)) < 0x7C00
