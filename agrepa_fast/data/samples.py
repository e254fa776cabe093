"""One clip: its features in memory, and as the members of a shard."""

import io
import json
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .index import Index, Shard

KINDS = (  # of faults
    *("missing", "unreadable", "checksum", "truncated", "corrupt"),  # of shards and their members
    *("missing_key", "dtype", "length", "not_finite", "tokens"),  # of clips
)


class ClipError(Exception):
    """A clip that cannot be used. kind: one of KINDS; member: the file in the shard, "" where it is the shard as a
    whole; reason: one line."""

    def __init__(self, kind: str, member: str, reason: str):
        super().__init__(kind, member, reason)
        self.kind, self.member, self.reason = kind, member, reason

    def __str__(self) -> str:
        return f"{self.member}: {self.reason}" if self.member else self.reason


@dataclass
class Sample:
    """One clip. mel (T, n_mels) fp16 natural log, tokens (S,) int32, teacher (dim,) or (frames, dim) fp16 as stored;
    `frames` is T. tokens2 (S,) int32, one for every token, where the shards have them."""

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

    @property
    def pooled(self) -> np.ndarray:
        """(dim,) float32: the teacher's vector, or the mean of its frames."""
        return pooled(self.teacher)


def pooled(target: np.ndarray) -> np.ndarray:
    """What is stored of a teacher, (dim,) or (frames, dim) -> (dim,) float32, the vector or its mean over time."""
    return target.astype(np.float32) if target.ndim == 1 else target.mean(axis=0, dtype=np.float32)


def _members(sample: Sample, teacher: str) -> dict:
    fields = ("domain", "text", "labels", "frames", "seconds", "cut", "source", "licence")
    meta = {name: getattr(sample, name) for name in fields}
    return {
        "__key__": sample.key,
        "json": json.dumps(meta, ensure_ascii=False).encode(),
        "mel.npy": npy(sample.mel),
        "tokens.npy": npy(sample.tokens),
        **({} if sample.tokens2 is None else {"tokens2.npy": npy(sample.tokens2)}),
        f"{teacher}.npy": npy(sample.teacher),
    }


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _sample(raw: dict, shard: Shard, index: Index) -> Sample:
    key, teacher = raw["__key__"], index.teacher(shard.domain)
    member = f"{key}.json"

    def check(right: bool, kind: str, what: str) -> None:
        if not right:
            raise ClipError(kind, member, what)

    def array(suffix: str, dtype: type) -> np.ndarray:
        nonlocal member
        member = f"{key}.{suffix}"
        values = _array(raw[suffix])
        check(values.dtype == dtype, "dtype", f"{values.dtype} {values.shape} is not {np.dtype(dtype)}")
        return values

    try:
        meta = json.loads(bytes(raw["json"]))
        frames, (first, end) = meta["frames"], index.token_range(shard.domain)
        mel = array("mel.npy", np.float16)
        shape = (frames, index.n_mels)
        check(mel.shape == shape, "length", f"{mel.shape} is not {shape}")
        check(frames <= shard.bucket, "length", f"{frames} frames are more than the {shard.bucket} of its bucket")
        check(_finite(mel), "not_finite", "not finite")
        tokens = array("tokens.npy", np.int32)
        check(tokens.ndim == 1 and len(tokens) > 0, "length", f"{tokens.shape} is no row of ids")
        check(first <= tokens.min() and tokens.max() < end, "tokens", f"ids outside {first} to {end - 1}")
        extra = None
        if index.extra_vocab is not None:
            extra = array("tokens2.npy", np.int32)
            check(extra.shape == tokens.shape, "length", f"{extra.shape} is not {tokens.shape}, as tokens")
            check(
                extra.min() >= 0 and extra.max() < index.extra_vocab,
                "tokens",
                f"ids outside 0 to {index.extra_vocab - 1}",
            )
        vector = array(f"{teacher.name}.npy", np.float16)
        pooled = teacher.rate is None
        right = vector.shape == (teacher.dim,) if pooled else vector.shape[1:] == (teacher.dim,) and len(vector) > 0
        wanted = f"({teacher.dim},)" if pooled else f"(frames, {teacher.dim})"
        check(right, "length", f"{vector.shape} is not {wanted}")
        check(_finite(vector), "not_finite", "not finite")
        member = f"{key}.json"
        check(meta["domain"] == shard.domain, "corrupt", f"domain {meta['domain']!r} in a shard of {shard.domain}")
        described = {name: meta[name] for name in ("domain", "text", "frames", "seconds", "cut", "source", "licence")}
        arrays = {"mel": mel, "tokens": tokens, "tokens2": extra, "teacher": vector}
        return Sample(key=key, labels=tuple(meta["labels"]), **arrays, **described)
    except KeyError as error:
        raise ClipError("missing_key", "", f"{key} lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ClipError("corrupt", "", f"{member} is damaged ({error})") from error


def _array(raw: memoryview) -> np.ndarray:
    """The array of an .npy of version 1.0, as np.load gives it, a tenth of its time. Raises ValueError."""
    start = 10 + int.from_bytes(raw[8:10], "little")
    if bytes(raw[:8]) != b"\x93NUMPY\x01\x00" or len(raw) < start:
        raise ValueError("no .npy of version 1.0")
    shape, fortran, dtype = _npy_header(bytes(raw[8:start]))
    if dtype.hasobject:
        raise ValueError("Python objects")
    count = math.prod(shape)
    if len(raw) - start != count * dtype.itemsize:
        raise ValueError(f"{len(raw) - start} bytes are not {shape} of {dtype}")
    values = np.frombuffer(raw, dtype, count, start)
    return values.reshape(shape, order="F" if fortran else "C").copy()  # what is kept of a shard must not be all of it


@lru_cache(maxsize=8192)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    return np.lib.format.read_array_header_1_0(io.BytesIO(header))


def _finite(values: np.ndarray) -> bool:
    """Whether all float16 values are finite: those with all exponent bits set are not."""
    return int((values.view(np.uint16) & 0x7C00).max(initial=0)) < 0x7C00
