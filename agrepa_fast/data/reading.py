"""Clips out of WebDataset shards: every member checked against what index.json says, no pickle, no path.

`read_shard` wants a shard that is as it was written. Training opens shards with `OpenShard`, which gives every good
clip and says of each other one what is wrong with it.
"""

import hashlib
import io
import json
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import UserError
from .index import Index, Sample, Shard, remedy
from .locations import Place, ReadError, read_object

KINDS = (  # of faults
    *("missing", "unreadable", "checksum", "truncated", "corrupt"),  # of shards and their members
    *("missing_key", "dtype", "length", "not_finite", "tokens"),  # of clips
)
_BLOCK = 512  # of a tar
_END = bytes(_BLOCK)


class ClipError(Exception):
    """A clip that cannot be used. kind: one of KINDS; member: the file in the shard, "" where it is the shard as a
    whole; reason: one line."""

    def __init__(self, kind: str, member: str, reason: str):
        super().__init__(kind, member, reason)
        self.kind, self.member, self.reason = kind, member, reason

    def __str__(self) -> str:
        return f"{self.member}: {self.reason}" if self.member else self.reason


@dataclass(frozen=True)
class Fault:
    """A clip that training had to do without."""

    file: str  # the shard
    clip: int  # its number in the shard
    member: str
    kind: str
    reason: str


class OpenShard:
    """The bytes of a shard, and where its clips are in them. Opening never fails: what cannot be read is said clip by
    clip. Of a truncated shard the clips before the cut are there; one of another checksum than the index's has none."""

    def __init__(self, shard: Shard, index: Index):
        self.shard, self.index = shard, index
        # suffix -> content, and "__key__", of each clip; what hits the clips beyond them
        self.clips, self.error = _read_clips(shard.path, shard.bytes, shard.sha256, shard.clips)
        if sidecar := index.teacher(shard.domain).files.get(shard.path.name):
            path = shard.path.parent / sidecar["file"]
            targets, error = _read_clips(path, sidecar["bytes"], sidecar["sha256"], shard.clips)
            paired = list(zip(self.clips, targets, strict=False))
            if other := next((t for c, t in paired if c["__key__"] != t["__key__"]), None):
                what = f"{path.name} has clip {other['__key__']} out of order: add it again"
                paired, error = [], ClipError("corrupt", "", what)
            self.clips, self.error = [target | clip for clip, target in paired], self.error or error

    def __getitem__(self, number: int) -> Sample:
        """The clip of that number in the shard. Raises ClipError."""
        if number >= len(self.clips):
            raise self.error
        return _sample(self.clips[number], self.shard, self.index)


def read_shard(shard: Shard, index: Index) -> list[Sample]:
    """All clips of a shard, in its order. UserError, naming shard and member, for anything that is not as written."""
    opened = OpenShard(shard, index)
    try:
        if opened.error is not None:
            raise opened.error
        return [opened[number] for number in range(shard.clips)]
    except ClipError as error:
        raise UserError(f"{shard.path}: {error}: {remedy(index.folder)}") from error


def _read_clips(path: Place, size: int, sha256: str, clips: int) -> tuple[list[dict], ClipError | None]:
    """The clips of a tar that the index says this of, and what hits the others."""
    try:
        content = read_object(path, size)
    except ReadError as error:
        return [], ClipError(error.kind, "", str(error))
    if len(content) == size and (found := hashlib.sha256(content).hexdigest()) != sha256:
        return [], ClipError("checksum", "", f"{path.name} has SHA-256 {found}, not {sha256}")
    found, error = split_clips(content)
    if len(content) != size:
        kind = "truncated" if len(content) < size else "corrupt"
        error = ClipError(kind, "", f"{path.name} has {len(content)} bytes, not {size}")
    elif error is None and len(found) != clips:
        error = ClipError("corrupt", "", f"{path.name} holds {len(found)} clips, not {clips}")
    return found, error


def split_clips(tar: bytes) -> tuple[list[dict], ClipError | None]:
    """The clips of a tar: for each its "__key__", and suffix -> content; and what ended the reading before the end.

    Members are files of one flat folder, `<key>.<suffix>`, a clip's beside each other. The last clip before a cut or a
    damaged header is left out, since members of it may be missing.
    """
    clips, view, offset, long_name = [], memoryview(tar), 0, None
    try:
        while (header := tar[offset : offset + _BLOCK]) != _END:
            name, kind, size = _tar_header(header)
            start = offset + _BLOCK
            if start + size > len(tar):
                raise ClipError("truncated", name, "ends before its content does")
            offset = start + -(-size // _BLOCK) * _BLOCK
            if kind in (b"x", b"L"):
                long_name = _long_name(kind, tar[start : start + size])
                continue
            name, long_name = long_name or name, None
            if kind != b"0":
                raise ClipError("corrupt", "", f"member {name!r} is no plain file")
            # No "/", hence nothing absolute and no parent folder.
            if "/" in name or "\\" in name or name.startswith("."):
                raise ClipError("corrupt", "", f"member {name!r} has a path")
            key, _, suffix = name.partition(".")
            if not clips or clips[-1]["__key__"] != key:
                clips.append({"__key__": key})
            clips[-1][suffix] = view[start : start + size]
    except ClipError as error:
        return clips[:-1], error
    return clips, None


def _tar_header(header: bytes) -> tuple[str, bytes, int]:
    """Name, type and size of a tar's member (POSIX ustar). Raises ClipError."""
    if len(header) < _BLOCK:
        raise ClipError("truncated", "", "ends before the end of its archive")
    try:
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(header[148:156].strip(b"\0 "), 8):
            raise ValueError("its checksum differs")
        name = header[:100].partition(b"\0")[0].decode()
        if prefix := header[345:500].partition(b"\0")[0].decode():
            name = f"{prefix}/{name}"
        return name, header[156:157].replace(b"\0", b"0"), int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise ClipError("corrupt", "", f"a header of its archive is damaged ({error})") from error


def _long_name(kind: bytes, content: bytes) -> str | None:
    """What a GNU long name, or the `path` of a PAX header, says of the next member. Raises ClipError."""
    try:
        if kind == b"L":
            return content.rstrip(b"\0").decode()
        name = None
        while content:
            length = int(content.partition(b" ")[0])
            if not 0 < length <= len(content):
                raise ValueError(f"a record of {length} bytes")
            field, _, value = content[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
            content = content[length:]
            if field == b"size":
                raise ValueError("a member of 8 GB or more")
            if field == b"path":
                name = value.decode()
        return name
    except ValueError as error:
        raise ClipError("corrupt", "", f"a header of its archive is damaged ({error})") from error


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
