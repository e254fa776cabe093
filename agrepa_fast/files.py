"""Files that are whole or absent, their hashes, and the lock of a folder."""

import errno
import fcntl
import hashlib
import os
import socket
import uuid
from pathlib import Path
from typing import TextIO

from .errors import UserError


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_PROCESS = uuid.uuid4().hex[:8]


def _part(path: Path) -> Path:
    """Where a file is written before it has its name; no other process's place, should one live on unnoticed."""
    return path.with_name(f".{path.name}.{_PROCESS}.part")


def write_atomically(path: Path, content: bytes) -> None:
    """The file is the old one or the new one, never a part."""
    part = _part(path)
    part.write_bytes(content)
    part.replace(path)


_claimed: list[TextIO] = []  # open as long as the process lives


def claim(folder: Path) -> None:
    """Make this process the only one that trains in `folder`, until it ends. UserError when another one does: a run
    whose launcher was killed goes on, and two of them would overwrite each other's checkpoints."""
    path = folder / ".lock"
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, loader processes do not inherit it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            return
        raise UserError(
            f"run.dir={folder} is in use by {path.read_text().strip() or 'another process'}: end it first, or choose "
            "another folder"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _claimed.append(file)
