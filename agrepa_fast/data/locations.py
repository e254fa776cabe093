"""Where shards live: a local folder, or http(s)://, s3://, gs://, any URL that fsspec has a file system for.

What exists locally is local, whatever it is called. Reads are whole objects into memory. Nothing is ever handed to a
shell: WebDataset's `pipe:` does not exist here, and fsspec's chained URLs ("a::b") are refused.
"""

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ..errors import UserError

BACK_OFF = 0.5  # seconds before the second attempt; doubles from one to the next
LONGEST_WAIT = 30.0
SLOWEST = 1e6  # bytes/s that a healthy read exceeds, beyond its time-out
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::).+")


class ReadError(UserError):
    """An object that could not be read, in one line that names it. kind: "missing" or "unreadable"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Remote:
    """A folder or an object behind a URL, with what reading needs of Path.

    timeout: seconds that one attempt may take, and 1 s more for each MB that is known to come. attempts: in all, with
    exponential back-off between them.
    """

    url: str
    timeout: float = 60.0
    attempts: int = 6

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Self:
        return replace(self, url=f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Self:
        return replace(self, url=self.url.rstrip("/").rpartition("/")[0])


Place = Path | Remote


def locate(path: str | Place, timeout: float = 60.0, attempts: int = 6) -> Place:
    """What a setting such as data.path names. UserError for a URL that is chained or whose file system is missing."""
    if not isinstance(path, str):
        return path
    local = Path(path)
    if not _URL.fullmatch(path) or local.exists():
        return local
    if path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    place = Remote(path, timeout, attempts)
    _file_system(place)
    return place


def writable(path: str | Path, setting: str) -> Path:
    """The local folder that a command may write. UserError for a URL."""
    place = locate(str(path))
    if isinstance(place, Remote):
        raise UserError(f"{setting}={place}: nothing is written to a URL: give a local folder, and copy it there")
    return place


def read_object(place: Place, size: int | None = None) -> bytes:
    """All bytes of a file or an object.

    A remote object is asked for again while it cannot be read, or is not of `size` bytes; after the last attempt what
    came is returned, of whatever size. Raises ReadError.
    """
    if isinstance(place, Path):
        try:
            return place.read_bytes()
        except OSError as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise ReadError(kind, f"{place}: {error.strerror or error}") from error
    system, path = _file_system(place)
    content, failure = None, None
    for attempt in range(place.attempts):
        if attempt:
            time.sleep(min(LONGEST_WAIT, BACK_OFF * 2 ** (attempt - 1)))
        try:
            content = _read_once(system, path, place.timeout + (size or 0) / SLOWEST)
        except FileNotFoundError as error:
            raise ReadError("missing", f"{place} does not exist") from error
        except Exception as error:  # each file system has errors of its own, few of them OSErrors
            failure = error
        else:
            if size is None or len(content) == size:
                return content
    if content is not None:
        return content
    what = " ".join(str(failure).split()) or "no answer in time"
    tried = f"{place.attempts} attempts of {place.timeout:g} s"
    raise ReadError("unreadable", f"{place}: {type(failure).__name__}: {what[:200]} ({tried})") from failure


def _read_once(system, path: str, timeout: float) -> bytes:
    if system.async_impl:  # its loop cancels what takes too long; the others have time-outs of their own
        return system.cat_file(path, timeout=timeout)
    return system.cat_file(path)


def _file_system(place: Remote) -> tuple:
    """fsspec's file system and the path in it. Asked for at each read: fsspec keeps one in every process, and makes
    another after a fork."""
    from fsspec.core import url_to_fs

    if "::" in place.url:
        raise UserError(f"{place}: chained URLs are not read: give the object's own URL")
    try:
        return url_to_fs(place.url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{place} cannot be opened: {' '.join(str(error).split())}") from error
