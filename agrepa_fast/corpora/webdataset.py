"""Recordings in other people's WebDataset tars."""

import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from ..audio.waves import MORE_SUFFIXES, SOUNDFILE_SUFFIXES
from ..errors import UserError
from .descriptions import MAX_DESCRIPTION, TEXTS, recording_fields
from .recordings import PassedOver, Recording, Source, check_domain, count_kinds, key_of_path, printable
from .walk import Walk

_AUDIO = tuple(suffix[1:] for suffix in SOUNDFILE_SUFFIXES)
_MORE_AUDIO = tuple(suffix[1:] for suffix in MORE_SUFFIXES)
_TEXTS = ("txt", "json")
_TAR_BLOCK = 512
_TAR_NAMES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_PARTS = 1_000_000  # of a pattern with braces
_REMEDY = "make or fetch it again, or leave it out"
_PART = "part of a split tar"
# As `split` and archivers name them: a.tar.00, a.tar.aa, a.tgz.001, a.tar.part1.
_TAR_PART = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))[-_.]?(part)?[-_.]?(\d+|[a-z]{2})$", re.IGNORECASE)
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


class _Member(NamedTuple):
    """A member of a tar that is a file."""

    group: str  # the sample's key by WebDataset's rule: up to the first dot
    key: str  # the recording's: up to the last dot, if a suffix of a recording or of a description comes after it
    suffix: str
    offset: int
    size: int  # bytes

    @property
    def complete(self) -> bool:
        """Whether the key has all of the name but its last suffix, so that it comes once in a tar."""
        return "." not in self.suffix


def webdataset_source(pattern: str, domain: str) -> Source:
    """Return the samples of WebDataset shards as a source. `pattern` is a folder of tars, a glob, or braces; a sample
    has one audio member, and .txt or .json. A tar may consist of several that were concatenated.

    A sample without audio, or with unreadable json, becomes a recording with a problem. Links among the members and
    other members are passed over. Raises UserError for a tar that is compressed or damaged, has a member with an
    absolute or a parent path, or holds a sample twice.
    """
    check_domain(domain)
    passed_over: list[PassedOver] = []
    shards = _shards(pattern, passed_over)
    root = os.path.commonpath([shard.parent for shard in shards])
    recordings = []
    for shard in shards:
        recordings += _Shard(shard, shard.relative_to(root).as_posix(), domain, passed_over).recordings()
    if not recordings:
        seen = count_kinds(entry.kind for entry in passed_over)
        wanted = f"members <key>{', <key>'.join((*SOUNDFILE_SUFFIXES, *MORE_SUFFIXES))} are read"
        raise UserError(f"{pattern} holds no recordings: {wanted}, and it has {seen}")
    return Source.of(pattern, domain, recordings, passed_over)


def _shards(pattern: str, passed_over: list[PassedOver]) -> list[Path]:
    files = _tars_below(Path(pattern), passed_over) if Path(pattern).is_dir() else _matches(pattern)
    shards = sorted({file.absolute() for file in files if file.is_file()})
    others = (printable(str(file)) for file in files if not file.is_file())
    passed_over += [PassedOver(name, "no regular file", "a folder, a link to nowhere or a pipe") for name in others]
    if not shards:
        parts = "; join the parts of a split tar, in their order, with cat" * any(e.kind == _PART for e in passed_over)
        raise UserError(f"{pattern} holds no tars: name a folder of them, a glob or braces, in quotes{parts}")
    return shards


def _tars_below(root: Path, passed_over: list[PassedOver]) -> list[Path]:
    walk, tars = Walk(root), []
    for folder, names in walk.folders():
        for name in names:
            if name.startswith("."):
                walk.pass_over(f"{folder}/{name}", "hidden file", "hidden")
            elif name.endswith(_TAR_NAMES):
                tars.append(Path(folder, name))
            elif _TAR_PART.search(name):
                walk.pass_over(f"{folder}/{name}", _PART, "join the parts, in their order, with cat")
            else:
                walk.pass_over(f"{folder}/{name}", f"{Path(name).suffix} file".lstrip(), "no tar")
    passed_over += walk.passed_over
    return tars


def _matches(pattern: str) -> list[Path]:
    """Return the paths that a glob or braces name. Raises UserError for a part that names no file."""
    from braceexpand import UnbalancedBracesError, braceexpand

    # braceexpand keeps all numbers of a range in memory.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    large = any(len(start + end) > 99 or abs(int(end) - int(start)) > _MAX_PARTS for start, end in ranges)
    try:
        parts = [pattern] if large or Path(pattern).is_file() else list(islice(braceexpand(pattern), _MAX_PARTS + 1))
    except UnbalancedBracesError as error:
        raise UserError(f"{pattern}: a brace is not closed") from error
    if large or len(parts) > _MAX_PARTS:
        raise UserError(f"{pattern}: the braces name more than {_MAX_PARTS} files: give a glob, or a folder")
    paths = []
    for part in parts:
        names = [part] if Path(part).exists() else glob.glob(part, recursive=True)  # noqa: PTH207 - may be absolute
        if not names:
            raise UserError(f"{part}: there is no such file; a pattern is a folder, a glob or braces, in quotes")
        paths += map(Path, names)
    return paths


class _Shard:
    """A shard; `inside` is its path inside the source. Its other members are added to `passed_over`."""

    def __init__(self, path: Path, inside: str, domain: str, passed_over: list[PassedOver]):
        self.path, self.inside, self.domain, self.passed_over = path, inside, domain, passed_over
        self.beside: Counter[str] = Counter()  # suffixes of members beside the recordings of their sample

    def recordings(self) -> Iterator[Recording]:
        """Yield a recording per sample."""
        seen = set()
        with self.path.open("rb") as stream:
            for group, members in groupby(self._members(stream), key=lambda member: member.group):
                of_key: dict[str, dict[str, tuple[int, int]]] = {}
                complete: set[str] = set()
                for member in members:
                    found = of_key.setdefault(member.key, {})
                    if member.suffix in found or (member.complete and member.key in seen):
                        raise UserError(
                            f"{self.path}: {member.key}.{member.suffix} comes twice: WebDataset wants one sample a "
                            "key, in a row"
                        )
                    found[member.suffix] = (member.offset, member.size)
                    complete |= {member.key} if member.complete else set()
                seen |= complete
                yield from self._sample(stream, group, of_key)
        for suffix, count in self.beside.items():
            kind = f".{suffix.rpartition('.')[2]} members beside a recording"
            self._pass_over(f"*.{suffix}", kind, f"{count} members of samples that are taken")

    def _sample(self, stream, group: str, of_key: dict[str, dict[str, tuple[int, int]]]) -> Iterator[Recording]:
        """Yield the recordings of a sample by WebDataset's rule: one, or one per key if dots are in the keys."""
        with_audio = {key for key, members in of_key.items() if members.keys() & {*_AUDIO, *_MORE_AUDIO}}
        for key, members in of_key.items():
            if key in with_audio:
                shared = {} if group in with_audio else of_key.get(group, {})
                yield self._recording(stream, key, {name: shared[name] for name in _TEXTS if name in shared} | members)
            elif key == group and members.keys() & {*_TEXTS} and not with_audio:
                yield self._recording(stream, key, members)
            elif not with_audio:
                for suffix in members:
                    self._pass_over(f"{key}.{suffix}", f"member .{suffix}", "belongs to no recording")
            else:
                self.beside.update(suffix for suffix in members if not (key == group and suffix in _TEXTS))

    def _recording(self, stream, key: str, members: dict[str, tuple[int, int]]) -> Recording:
        audio = [suffix for suffix in members if suffix in _AUDIO]
        audio = audio or [suffix for suffix in members if suffix in _MORE_AUDIO]
        fields, problem = _description(stream, members)
        if len(audio) != 1:
            problem = f"has {len(audio)} audio members, of {', '.join(members)}"
        self.beside.update(suffix for suffix in members if suffix not in (*audio, *_TEXTS))
        suffix = audio[0] if audio else ""
        offset, size = members.get(suffix, (0, 0))
        return TarMember(
            name=key_of_path(f"{self.inside}/{key}"),
            path=str(self.path),
            domain=self.domain,
            source=printable(f"{self.inside}/{key}.{suffix}".rstrip(".")),
            problem=problem,
            offset=offset,
            size=size,
            **fields,
        )

    def _members(self, stream) -> Iterator[_Member]:
        """Yield the members that are files, of all tars that the file is a concatenation of."""
        start: int | None = 0
        try:
            while start is not None:
                stream.seek(start)
                with tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:
                    yield from self._members_of(tar)
                if start and tar.offset == start:
                    rest = f"{stream.seek(0, os.SEEK_END) - start} bytes, from byte {start} on, are no tar"
                    self._pass_over("", "bytes after the end of a tar", rest)
                    return
                # tarfile takes a damaged header for the end.
                stream.seek(tar.offset)
                if stream.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
                    raise UserError(f"{self.path} is damaged, or cut short, at byte {tar.offset}: {_REMEDY}")
                start = _next_block(stream)
        except UserError:
            raise
        except Exception as error:  # tarfile's parsing of a damaged header raises errors of many kinds
            stream.seek(0)
            first = stream.read(8)
            if tool := next((tool for magic, tool in _COMPRESSED.items() if first.startswith(magic)), None):
                raise UserError(
                    f"{self.path} is compressed, so that nothing can be read at its place: {tool} it"
                ) from error
            raise UserError(f"{self.path} is no tar, or cut short ({error}): {_REMEDY}") from error

    def _members_of(self, tar: tarfile.TarFile) -> Iterator[_Member]:
        while (info := tar.next()) is not None:
            tar.members.clear()  # a tar of a million members would keep them all
            if tar.offset <= info.offset or info.issparse():  # tarfile would turn in circles
                raise UserError(f"{self.path}: member {info.name!r} is sparse or of negative size: {_REMEDY}")
            parts = info.name.replace("\\", "/").split("/")
            if not parts[0] or ".." in parts or parts[0].endswith(":"):
                raise UserError(f"{self.path}: member {info.name!r} has an absolute or a parent path: {_REMEDY}")
            if member := self._member(info):
                yield member

    def _member(self, info: tarfile.TarInfo) -> _Member | None:
        """Return a member that is a file, or None, and account for others."""
        from webdataset.tariterators import base_plus_ext

        if not info.isfile():
            if not info.isdir():
                link = info.islnk() or info.issym()
                reason = f"links to {printable(info.linkname)}" if link else f"of type {info.type!r}"
                self._pass_over(info.name, "link among members" if link else "no plain member", reason)
            return None
        group, suffix = base_plus_ext(info.name.removeprefix("./"))
        if not group or group.endswith("/"):  # a/._x.flac has the key a/
            self._pass_over(info.name, "member without a key", "hidden, or without a suffix")
            return None
        suffix, last = suffix.lower(), suffix.lower().rpartition(".")[2]
        if last in (*_AUDIO, *_MORE_AUDIO, *_TEXTS):  # Track 2.0 (Live).mp3
            return _Member(group, info.name.removeprefix("./")[: -len(last) - 1], last, info.offset_data, info.size)
        return _Member(group, group, suffix, info.offset_data, info.size)

    def _pass_over(self, name: str, kind: str, reason: str) -> None:
        self.passed_over.append(PassedOver(printable(f"{self.inside}/{name}"), kind, reason))


class _Headers:
    """A tar for tarfile, which reads long names and attributes whole, however long a damaged header says they are."""

    def __init__(self, stream):
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if size > MAX_DESCRIPTION:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)


def _next_block(stream) -> int | None:
    """Return the place of the first block that is not zero, or None if all are zero."""
    while block := stream.read(256 * _TAR_BLOCK):
        if block.count(0) < len(block):
            first = len(block) - len(block.lstrip(b"\0"))
            return stream.tell() - len(block) + first // _TAR_BLOCK * _TAR_BLOCK
    return None


def _description(stream, members: dict[str, tuple[int, int]]) -> tuple[dict, str]:
    """Return text, labels, group and licence from a sample's .json and .txt; and their fault, or ""."""
    fields = {}
    try:
        for suffix in ("json", "txt"):
            if suffix in members:
                offset, size = members[suffix]
                if size > MAX_DESCRIPTION:
                    raise ValueError(f"{size} bytes")
                stream.seek(offset)
                content = stream.read(size).decode("utf-8-sig")
                fields |= json.loads(content) if suffix == "json" else {TEXTS[0]: content}
    except (ValueError, TypeError, RecursionError) as error:
        return recording_fields({}), f".{suffix} cannot be read ({error})"
    return recording_fields(fields), ""
