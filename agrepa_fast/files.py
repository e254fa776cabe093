"""Files that are whole or absent, their hashes, paths as users type them, and a lock that keeps other processes out of
a folder."""

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, TextIO
from weakref import WeakValueDictionary

from .errors import UserError


def local_path(text: str | Path) -> Path:
    """Return the path that a user has typed, with ~ for the home folder. Raises UserError if there is no home folder to
    put in its place."""
    path = os.path.expanduser(text)  # noqa: PTH111 - Path's raises RuntimeError
    if path.startswith("~"):
        raise UserError(f"{text}: no home folder is known here: set HOME, or write the whole path")
    return Path(path)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its byte order mark. Raises UserError, in one line, for another encoding
    and for a file that cannot be read."""
    try:
        _refuse_pipe(path)
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path, remedy: str) -> Any:
    """Return the content of a JSON file. Raises UserError for a file that is damaged, which ends with `remedy`, and for
    one that cannot be read."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def check_readable(path: Path) -> None:
    """Raise UserError if a file cannot be opened, with the system's reason: other packages call every such file
    missing."""
    try:
        _refuse_pipe(path)
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_pipe(path: Path) -> None:
    """Raise OSError for a pipe, a socket or a device, which may be read without end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "no regular file", str(path))


def check_writable(folder: Path, name: str) -> None:
    """Raise UserError, beginning with `name`, unless files can be written into a folder, which need not exist yet.
    Leaves nothing behind. Call it before work whose results go there."""
    made = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{name} {folder} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file so that a crash, of the process or of the machine, leaves its old content or all of the new. A text
    becomes UTF-8, with the bytes of file names that are not UTF-8 escaped. See replace_file for `durable`."""
    with replace_file(path, durable=durable) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def append_text(path: Path, text: str) -> str | None:
    """Append to a log. Return None, or the reason if it cannot be written: a log that is cut short ends no run."""
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        return error.strerror
    return None


@contextmanager
def replace_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path`, to write in a stream; at the end of the block it takes `path`'s name.

    Its content is on the disk before it has the name. If the block raises, the temporary file is removed and `path`
    stays as it was. durable=False survives a crash of the process alone, for the many small files of a preparation:
    waiting for the disk costs about 8 ms per file.
    """
    # A process that is killed leaves its temporary file behind, so no two of them may share a name.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Force the content of a file, or the names in a folder, from memory onto the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a network file system may have no fsync of folders
            raise
    finally:
        os.close(opened)


class FolderLock:
    """Keeps other processes out of a folder: `with FolderLock(folder, remedy):`, or `acquire` and `release`.

    folder: made if it is missing. remedy: ends the line of the UserError, such as "choose another --out".

    The lock is a POSIX record lock on `<folder>/.lock`. It ends with its process, however that ends, and forked
    processes do not inherit it (flock's would live on in a loader process). On a file system without locks nothing is
    locked. Keep the object: the lock ends with it, too.
    """

    # Record locks do not stop their own process: its locks are found here.
    _held: ClassVar[WeakValueDictionary[Path, Self]] = WeakValueDictionary()

    def __init__(self, folder: Path, remedy: str):
        self.folder, self.remedy = folder, remedy
        self._file: TextIO | None = None

    def acquire(self) -> Self:
        """Lock the folder. Raises UserError, with the holder's process and host, if the folder is locked, or if it
        cannot be written."""
        key = self.folder.resolve()
        if key in self._held:
            # Opening the file again and closing it would drop the lock that this process holds.
            raise self._in_use("this process")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): {self.remedy}") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                with file:
                    raise self._in_use(file.read().strip() or "another process") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        self._held[key] = self
        return self

    def release(self) -> None:
        """Unlock the folder, if this object holds its lock."""
        if self._file is not None:
            self._held.pop(self.folder.resolve(), None)
            self._file.close()
            self._file = None

    def _in_use(self, holder: str) -> UserError:
        return UserError(f"{self.folder} is in use by {holder}: wait for it or end it, or {self.remedy}")

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()
