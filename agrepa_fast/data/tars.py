"""The tar of a shard, as clips."""

import io
import json
import tarfile
from pathlib import Path

from ..errors import UserError
from .index import remedy
from .samples import ClipError


def split_clips(tar: bytes) -> tuple[list[dict], ClipError | None]:
    """Return the clips of a tar, for each its "__key__" and suffix -> content, and the error that ended the reading
    early, if one did.

    Members are files of one flat folder, `<key>.<suffix>`, a clip's beside each other. The last clip before a cut or a
    damaged header is left out, since members of it may be missing.
    """
    clips: list[dict] = []
    offset = 0  # of the next header
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:", errors="strict") as archive:
            for member in archive:
                _add_member(member, tar, clips)
                offset = archive.offset
        if tar[offset : offset + tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"at byte {offset}")  # tarfile takes any bad header but the first for the end
    except ClipError as error:
        return clips[:-1], error
    except Exception as error:  # tarfile's parsing of a damaged header raises errors of many kinds
        if offset + tarfile.BLOCKSIZE > len(tar):
            return clips[:-1], ClipError("truncated", "", "ends before the end of its archive")
        return clips[:-1], ClipError("corrupt", "", f"a header of its archive is damaged ({error})")
    return clips, None


def read_descriptions(path: Path) -> list[tuple[str, dict]]:
    """Return key and json of every clip of a local shard, in its order. Skips the arrays. Raises UserError if it cannot
    be read."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [
                (member.name.removesuffix(".json"), json.load(tar.extractfile(member)))
                for member in tar
                if member.name.endswith(".json")
            ]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy(path.parent)}") from error


def _add_member(member: tarfile.TarInfo, tar: bytes, clips: list[dict]) -> None:
    name, start, end = member.name, member.offset_data, member.offset_data + member.size
    if member.size < 0:  # Python before 3.11.14 would read the same header again and again
        raise ClipError("corrupt", "", f"member {name!r} has {member.size} bytes")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ClipError("corrupt", "", f"member {name!r} is no plain file")
    if "/" in name or "\\" in name or name.startswith("."):  # so nothing is absolute or in a parent folder
        raise ClipError("corrupt", "", f"member {name!r} has a path")
    if end > len(tar):
        raise ClipError("truncated", name, "ends before its content does")
    key, _, suffix = name.partition(".")
    if not clips or clips[-1]["__key__"] != key:
        clips.append({"__key__": key})
    clips[-1][suffix] = memoryview(tar)[start:end]
