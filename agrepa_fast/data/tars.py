"""Tars of shards, read."""

from .samples import ClipError

_BLOCK = 512  # of a tar
_END = bytes(_BLOCK)


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
