"""Recordings in other people's WebDataset tars."""

import glob
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ..audio.waves import SOUNDFILE_SUFFIXES
from ..errors import UserError
from .descriptions import TEXTS, recording_fields
from .recordings import Recording, Source, check_domain, key_of_path, printable
from .walk import walk_folders

_AUDIO = tuple(suffix[1:] for suffix in SOUNDFILE_SUFFIXES)
_TAR_BLOCK = 512
_TAR_NAMES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_DESCRIPTION = 2**20  # bytes of a .txt or .json
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember(Recording):
    """A member of an uncompressed tar, read at its place; its name is never used as a path."""

    offset: int
    size: int  # bytes

    def content(self) -> bytes:
        try:
            with open(self.path, "rb") as stream:  # noqa: PTH123 - `path` is a str
                stream.seek(self.offset)
                content = stream.read(self.size)
        except OSError as error:
            raise UserError(f"{self.source}: {self.path} cannot be read ({error.strerror})") from error
        if len(content) < self.size:
            raise UserError(f"{self.source}: {self.path} has become shorter: run `agrepa prepare` again")
        return content

    def fingerprint(self) -> list:
        return [*Recording.fingerprint(self), self.offset, self.size]


def webdataset_source(pattern: str, domain: str) -> Source:
    """Return the samples of WebDataset shards as a source. `pattern` is a folder of tars, a glob, or braces; a sample
    has one audio member, and .txt or .json.

    Ignores links among the members. A sample without audio, or with unreadable json, becomes a recording with a
    problem. Raises UserError for a tar that is compressed or damaged, has a member with an absolute or a parent path,
    or holds a sample twice.
    """
    check_domain(domain)
    shards = _shards(pattern)
    root = os.path.commonpath([shard.parent for shard in shards])
    recordings = [r for shard in shards for r in _samples(shard, shard.relative_to(root).as_posix(), domain)]
    if not recordings:
        raise UserError(f"{pattern} holds no recordings: members <key>{', <key>'.join(SOUNDFILE_SUFFIXES)} are read")
    return Source.of(pattern, domain, recordings)


def _shards(pattern: str) -> list[Path]:
    files = _tars_below(Path(pattern)) if Path(pattern).is_dir() else _matches(pattern)
    shards = sorted({file.absolute() for file in files if file.is_file()})
    if not shards:
        raise UserError(f"{pattern} holds no tars: name a folder of them, a glob or braces, in quotes")
    return shards


def _tars_below(root: Path) -> list[Path]:
    return [
        Path(folder, name)
        for folder, names in walk_folders(root)
        for name in names
        if name.endswith(_TAR_NAMES) and not name.startswith(".")
    ]


def _matches(pattern: str) -> list[Path]:
    """Return the paths that a glob or braces name. Raises UserError for a part that names no file."""
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        parts = [pattern] if Path(pattern).is_file() else list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise UserError(f"{pattern}: a brace is not closed") from error
    paths = []
    for part in parts:
        names = [part] if Path(part).exists() else glob.glob(part, recursive=True)  # noqa: PTH207 - may be absolute
        if not names:
            raise UserError(f"{part}: there is no such file; a pattern is a folder, a glob or braces, in quotes")
        paths += map(Path, names)
    return paths


def _samples(shard: Path, inside: str, domain: str) -> Iterator[Recording]:
    """Yield a recording per sample of a shard; `inside` is the shard's path inside the source."""
    seen = set()
    with shard.open("rb") as stream:
        for key, group in groupby(_members(shard, stream), key=lambda member: member[0]):
            members = {}
            for _, suffix, offset, size in group:
                if suffix in members or key in seen:
                    raise UserError(f"{shard}: {key}.{suffix} comes twice: WebDataset wants one sample a key, in a row")
                members[suffix] = (offset, size)
            seen.add(key)
            audio = [suffix for suffix in members if suffix in _AUDIO]
            if not audio and not {"txt", "json"} & members.keys():
                continue
            fields, problem = _description(stream, members)
            if len(audio) != 1:
                problem = f"has {len(audio)} audio members, of {', '.join(members)}"
            suffix = audio[0] if audio else ""
            offset, size = members.get(suffix, (0, 0))
            yield TarMember(
                name=key_of_path(f"{inside}/{key}"),
                path=str(shard),
                domain=domain,
                source=printable(f"{inside}/{key}.{suffix}".rstrip(".")),
                problem=problem,
                offset=offset,
                size=size,
                **fields,
            )


def _members(shard: Path, stream) -> Iterator[tuple[str, str, int, int]]:
    """Yield (key, suffix, offset, size in bytes) per member that is a file, by WebDataset's rule for names."""
    from webdataset.tariterators import base_plus_ext

    remedy = "make or fetch it again, or leave it out"
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # a tar of a million members would keep them all
                if tar.offset <= member.offset or member.issparse():  # tarfile would turn in circles
                    raise UserError(f"{shard}: member {member.name!r} is sparse or of negative size: {remedy}")
                parts = member.name.replace("\\", "/").split("/")
                if not parts[0] or ".." in parts or parts[0].endswith(":"):
                    raise UserError(f"{shard}: member {member.name!r} has an absolute or a parent path: {remedy}")
                key, suffix = base_plus_ext(member.name.removeprefix("./"))
                if key and member.isfile() and not key.endswith("/"):  # a/._x.flac has the key a/
                    yield key, suffix.lower(), member.offset_data, member.size
            # tarfile takes a damaged header for the end.
            stream.seek(tar.offset)
            if stream.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
                raise UserError(f"{shard} is damaged, or cut short, at byte {tar.offset}: {remedy}")
    except (tarfile.TarError, OSError, ValueError) as error:
        stream.seek(0)
        first = stream.read(8)
        if tool := next((tool for magic, tool in _COMPRESSED.items() if first.startswith(magic)), None):
            raise UserError(f"{shard} is compressed, so that nothing can be read at its place: {tool} it") from error
        raise UserError(f"{shard} is no tar, or cut short ({error}): {remedy}") from error


def _description(stream, members: dict[str, tuple[int, int]]) -> tuple[dict, str]:
    """Return text, labels, group and licence from a sample's .json and .txt; and their fault, or ""."""
    fields = {}
    try:
        for suffix in ("json", "txt"):
            if suffix in members:
                offset, size = members[suffix]
                if size > _MAX_DESCRIPTION:
                    raise ValueError(f"{size} bytes")
                stream.seek(offset)
                content = stream.read(size).decode("utf-8-sig")
                fields |= json.loads(content) if suffix == "json" else {TEXTS[0]: content}
    except (ValueError, TypeError, RecursionError) as error:
        return recording_fields({}), f".{suffix} cannot be read ({error})"
    return recording_fields(fields), ""
