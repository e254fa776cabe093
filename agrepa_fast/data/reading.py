"""Clips out of WebDataset shards: every member checked against what index.json says, no pickle, no path.

`read_shard` wants a shard that is as it was written. Training opens shards with `OpenShard`, which gives every good
clip and says of each other one what is wrong with it.
"""

import hashlib
from dataclasses import dataclass

from ..errors import UserError
from .index import Index, Shard, remedy
from .locations import Location, ReadError, read_object
from .samples import ClipError, Sample, _sample
from .tars import split_clips


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


def _read_clips(path: Location, size: int, sha256: str, clips: int) -> tuple[list[dict], ClipError | None]:
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


def fixed_clips(index: Index, split: str, domain: str, count: int) -> list[Sample]:
    """Return `count` clips of a domain, the same in every run: the first in shard order of each length bucket, as many
    as its share of the domain's clips.

    Raises UserError if there are fewer, or if one of them is not as it was written: measurements on other clips could
    not be compared.
    """
    available = index.clips(split, domain)
    if available < count:
        raise UserError(
            f"{index.folder}: {count} {domain} clips of the {split} split are wanted, {available} are there: "
            "prepare more recordings, or lower probe.clips and eval.clips"
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
