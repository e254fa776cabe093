"""Walk a tree of folders, linked ones included, and account for everything in it that is no recording."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..audio.waves import AUDIO_SUFFIXES
from .recordings import PassedOver, printable

COPY = "file of a recording that is taken"  # ends the kind of a file beside one with the same stem


class Walk:
    """A walk of a tree. `passed_over` grows as `folders` and `recordings` are called."""

    def __init__(self, root: Path):
        self.root, self.passed_over = str(root), []

    def folders(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (folder, sorted names of its files) for the root and all folders below it but hidden ones.

        Every folder comes once, so links may form loops. Links are followed after the real folders: a recording that
        has a path without links keeps its name. Prints a line per folder that cannot be read.
        """
        seen, links = set(), [self.root]
        while links:
            below, links = [links[0]], links[1:]
            while below:  # no recursion: trees may be deeper than Python's stack
                folder = below.pop()
                try:
                    status = os.stat(folder)  # noqa: PTH116 - Path.stat takes three times as long
                    names = _list(folder)
                except OSError as error:
                    self._report(error)
                    continue
                identity = (status.st_dev, status.st_ino)
                if identity in seen:
                    self.pass_over(folder, "link", "a link to a folder that is read at another place")
                    continue
                seen.add(identity)
                for name in (name for name in names["folder"] + names["link"] if name.startswith(".")):
                    self.pass_over(f"{folder}/{name}", "hidden folder", "hidden")
                yield folder, names["file"]
                below += [f"{folder}/{name}" for name in reversed(names["folder"]) if not name.startswith(".")]
                links += [f"{folder}/{name}" for name in names["link"] if not name.startswith(".")]

    def recordings(self, folder: str, names: list[str], used: set[str] = frozenset()) -> list[str]:
        """Return those of a folder's files that are recordings, by their suffixes. `used`: names of other files that
        are not passed over.

        Of files with the same stem, a sound and its copy or its video, the one whose suffix comes first in
        AUDIO_SUFFIXES is taken, and the others are passed over.
        """
        audio = []
        for name in names:
            suffix = _split(name)[1]
            if name.startswith("."):
                self.pass_over(f"{folder}/{name}", "hidden file", "hidden")
            elif suffix in AUDIO_SUFFIXES:
                if self._is_file(f"{folder}/{name}"):
                    audio.append(name)
            elif name not in used:
                kind = f"{suffix} file" if suffix else "file without a suffix"
                self.pass_over(f"{folder}/{name}", kind, "no suffix of a recording")
        of_stem: dict[str, str] = {}
        for name in sorted(audio, key=lambda name: AUDIO_SUFFIXES.index(_split(name)[1])):
            of_stem.setdefault(_split(name)[0], name)
        for name in audio:
            stem, suffix = _split(name)
            if of_stem[stem] != name:
                kind = f"{suffix} {COPY}"
                self.pass_over(f"{folder}/{name}", kind, f"{printable(of_stem[stem])} is taken")
        return [name for name in audio if of_stem[_split(name)[0]] == name]

    def pass_over(self, path: str, kind: str, reason: str) -> None:
        """Record that a path below the root is not taken."""
        self.passed_over.append(PassedOver(printable(path.removeprefix(self.root).lstrip("/") or "."), kind, reason))

    def _is_file(self, path: str) -> bool:
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                self.pass_over(path, "link", "a link to nowhere")
            else:
                self.pass_over(path, "unreadable file", error.strerror)
            return False
        if not stat.S_ISREG(mode):
            self.pass_over(path, "no regular file", "a pipe, a socket or a device")
        return stat.S_ISREG(mode)

    def _report(self, error: OSError) -> None:
        print(f"{printable(error.filename)} cannot be read ({error.strerror}): passed over")
        self.pass_over(error.filename, "unreadable folder", error.strerror)


def _split(name: str) -> tuple[str, str]:
    """Return the stem and the suffix of a file's name, the suffix in small letters."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122 - for millions of files
    return stem, suffix.lower()


def _list(folder: str) -> dict[str, list[str]]:
    """Return the sorted names in a folder: of folders, of links to folders, and of everything else."""
    names = {"folder": [], "link": [], "file": []}
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder, is_link = entry.is_dir(), entry.is_symlink()
            except OSError:
                is_folder = is_link = False
            names[("link" if is_link else "folder") if is_folder else "file"].append(entry.name)
    return {kind: sorted(of_kind) for kind, of_kind in names.items()}


def walk_folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders of a Walk."""
    return Walk(root).folders()
