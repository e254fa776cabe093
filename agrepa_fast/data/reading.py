"""Clips out of shards: every member is checked against index.json, nothing is unpickled, no member has a path.

`read_shard` takes a shard only if it is as it was written. Training opens shards with `OpenShard`, which gives every
good clip, and for each other clip its fault.
"""

import hashlib
from dataclasses import dataclass

from ..errors import UserError
from .index import Index, Shard, remedy
from .locations import Location, ReadError, read_object
from .samples import ClipError, Sample, parse_sample
from .tars import split_clips


@dataclass(frozen=True)
class Fault:
    """The fault of a clip that training did without."""

    file: str  # the shard
    clip: int  # its place in the shard
    member: str
    kind: str
    reason: str


class OpenShard:
    """The bytes of a shard, and its clips in them.

    Opening never fails: asking for a clip that cannot be read does. A truncated shard has the clips before the cut; a
    shard whose checksum is not the index's has none.
    """

    def __init__(self, shard: Shard, index: Index):
        self.shard, self.index = shard, index
        # The members of each clip, and the error of the clips beyond them.
        self.clips, self.error = _read_clips(shard.path, shard.bytes, shard.sha256, shard.stored)
        for sidecar in index.sidecars(shard):
            path = shard.path.parent / sidecar["file"]
            added, error = _read_clips(path, sidecar["bytes"], sidecar["sha256"], shard.stored)
            pairs = list(zip(self.clips, added, strict=False))
            wrong = [beside["__key__"] for clip, beside in pairs if clip["__key__"] != beside["__key__"]]
            if wrong:
                reason = f"{path.name} has clip {wrong[0]} out of order: add it again"
                pairs, error = [], ClipError("corrupt", "", reason)
            self.clips, self.error = [beside | clip for clip, beside in pairs], self.error or error

    def __getitem__(self, number: int) -> Sample:
        """Return the clip of that number among those of the shard that are taken. Raises ClipError."""
        place = self.shard.places[number]
        if place >= len(self.clips):
            raise self.error
        return parse_sample(self.clips[place], self.shard, self.index)


def read_shard(shard: Shard, index: Index) -> list[Sample]:
    """Return the clips of a shard that are taken, in its order. Raises UserError, with shard and member, for anything
    that is not as it was written."""
    opened = OpenShard(shard, index)
    try:
        if opened.error is not None:
            raise opened.error
        return [opened[number] for number in range(shard.clips)]
    except ClipError as error:
        raise UserError(f"{shard.path}: {error}: {remedy(index.folder)}") from error


def _read_clips(path: Location, size: int, sha256: str, clips: int) -> tuple[list[dict], ClipError | None]:
    """Return the clips of a tar whose size, checksum and number of clips stand in the index, and the error of the clips
    that are missing."""
    try:
        content = read_object(path, size)
    except ReadError as error:
        return [], ClipError(error.kind, "", str(error))
    if len(content) == size and (computed := hashlib.sha256(content).hexdigest()) != sha256:
        return [], ClipError("checksum", "", f"{path.name} has SHA-256 {computed}, not {sha256}")
    read, error = split_clips(content)
    if len(content) != size:
        kind = "truncated" if len(content) < size else "corrupt"
        error = ClipError(kind, "", f"{path.name} has {len(content)} bytes, not {size}")
    elif error is None and len(read) != clips:
        error = ClipError("corrupt", "", f"{path.name} holds {len(read)} clips, not {clips}")
    return read, error


def fixed_clips(
    index: Index, split: str, domain: str, count: int, settings: str = "probe.clips and eval.clips"
) -> list[Sample]:
    """Return `count` clips of a domain, at least one, the same in every run: the first in shard order of each length
    bucket, as many as its share of the domain's clips. settings: those that say how many.

    Raises UserError if there are fewer, or if one of them is not as it was written: measurements on other clips could
    not be compared.
    """
    available, count = index.clips(split, domain), max(1, count)
    if available < count:
        raise UserError(
            f"{index.folder}: {count} {domain} clips of the {split} split are wanted, {available} are there: "
            f"prepare more recordings{f', or lower {settings}' if available else ''}"
        )
    buckets: dict[int, list[Shard]] = {}
    for shard in index.shards(split, domain):
        buckets.setdefault(shard.bucket, []).append(shard)
    samples: list[Sample] = []
    counts = _proportional(count, [sum(shard.clips for shard in shards) for shards in buckets.values()])
    for shards, wanted in zip(buckets.values(), counts, strict=True):
        of_bucket: list[Sample] = []
        for shard in shards:
            if len(of_bucket) < wanted:
                of_bucket += read_shard(shard, index)
        samples += of_bucket[:wanted]
    return samples


def _proportional(total: int, sizes: list[int]) -> list[int]:
    """Split `total` in proportion to `sizes`, by largest remainders; the first of equal ones come first."""
    shares, remainders = zip(*(divmod(total * size, sum(sizes)) for size in sizes), strict=True)
    largest = sorted(range(len(sizes)), key=lambda i: -remainders[i])[: total - sum(shares)]
    return [share + (i in largest) for i, share in enumerate(shares)]
