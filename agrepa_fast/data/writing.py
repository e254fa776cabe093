"""Write shards: the same clips give the same bytes."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..files import replace_file
from .samples import Sample, sample_members
from .transcribed import transcribed


def write_shard(path: Path, samples: Iterable[Sample], teacher: str) -> dict:
    """Write a shard atomically. Returns its facts for index.json: file, clips, frames, transcribed, bytes, sha256."""
    described: list[dict] = []

    def members() -> Iterator[dict]:
        for sample in samples:
            described.append({"text": sample.text, "cut": sample.cut, "frames": sample.frames})
            yield sample_members(sample, teacher)

    written = write_tar(path, members())
    frames = sum(clip["frames"] for clip in described)
    facts = {"clips": len(described), "frames": frames, "transcribed": transcribed(described)}
    return {"file": path.name, **facts, **written}


def write_tar(path: Path, samples: Iterable[dict]) -> dict:
    """Write WebDataset samples {"__key__": …, suffix: bytes} atomically. Returns bytes and sha256 of the content that
    was written, whatever the disk makes of it."""
    from webdataset.writer import TarWriter

    with replace_file(path) as file:
        stream = _Hashed(file)
        with TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
    return {"bytes": stream.bytes, "sha256": stream.sha256.hexdigest()}


class _Hashed:
    """A file that is written from its start to its end, and the SHA-256 of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.bytes += len(content)
        return self.file.write(content)
