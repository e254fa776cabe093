"""Where shards live: a local folder, or http(s)://, s3://, gs://, any URL that fsspec has a file system for.

A name that exists locally is local, even if it looks like a URL. Reads are whole objects into memory. Nothing is ever
handed to a shell: WebDataset's `pipe:` does not exist here, and fsspec's chained URLs ("a::b") are refused.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ..errors import UserError
from ..files import local_path

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
    """A folder or an object behind a URL, with the parts of Path's interface that reading needs.

    timeout: seconds that one attempt may take, and 1 s more per MB that is expected. attempts: in all, with exponential
    back-off between them.
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


Location = Path | Remote


def locate(path: str | Location, timeout: float = 60.0, attempts: int = 6) -> Location:
    """Return the location that a setting such as data.path names.

    Raises UserError for a chained URL, and for one whose file system is not installed.
    """
    if not isinstance(path, str):
        return path
    local = local_path(path)
    if not _URL.fullmatch(path) or local.exists():
        return local
    if path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    remote = Remote(path, timeout, attempts)
    _file_system(remote)
    return remote


def writable(path: str | Path, setting: str) -> Path:
    """Return the local folder that a command may write. Raises UserError, with the setting's name, for a URL."""
    location = locate(str(path))
    if isinstance(location, Remote):
        raise UserError(f"{setting}={location}: nothing is written to a URL: give a local folder, and copy it there")
    return location


def read_object(location: Location, size: int | None = None) -> bytes:
    """Return all bytes of a file or an object.

    A remote object is read again if an attempt fails, or if it does not give `size` bytes. After the last attempt a
    content of another size is returned as it is; without any content ReadError is raised.
    """
    if isinstance(location, Path):
        try:
            return location.read_bytes()
        except OSError as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise ReadError(kind, f"{location}: {error.strerror or error}") from error
    return _read_remote(location, size)


def _read_remote(remote: Remote, size: int | None) -> bytes:
    from tenacity import RetryError, Retrying, TryAgain, retry_if_exception, stop_after_attempt, wait_exponential

    content = None

    def attempt() -> None:
        nonlocal content
        try:
            content = _read_once(remote, remote.timeout + (size or 0) / SLOWEST)
        except FileNotFoundError as error:
            raise ReadError("missing", f"{remote} does not exist") from error
        if size is not None and len(content) != size:
            raise TryAgain

    try:
        # Each file system has errors of its own, few of them OSErrors.
        Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, UserError)),
            wait=wait_exponential(multiplier=BACK_OFF, max=LONGEST_WAIT),
            stop=stop_after_attempt(remote.attempts),
        )(attempt)
    except RetryError as error:
        if content is None:
            failure = error.last_attempt.exception()
            reason = " ".join(str(failure).split()) or "no answer in time"
            tried = f"{remote.attempts} attempts of {remote.timeout:g} s"
            line = f"{remote}: {type(failure).__name__}: {reason[:200]} ({tried})"
            raise ReadError("unreadable", line) from failure
    return content


def _read_once(remote: Remote, timeout: float) -> bytes:
    system, path = _file_system(remote)
    if system.async_impl:  # its loop cancels a read that takes too long; other systems have time-outs of their own
        return system.cat_file(path, timeout=timeout)
    return system.cat_file(path)


def _file_system(remote: Remote) -> tuple:
    """Return fsspec's file system of a URL and the path in it. fsspec itself keeps one per process, and makes another
    after a fork."""
    from fsspec.core import url_to_fs

    if "::" in remote.url:
        raise UserError(f"{remote}: chained URLs are not read: give the object's own URL")
    try:
        return url_to_fs(remote.url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{remote} cannot be opened: {' '.join(str(error).split())}") from error
