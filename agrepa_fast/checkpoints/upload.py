"""A copy of a run's checkpoints elsewhere, made in the background: another disk, or an object store through fsspec."""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .weights import MARKER, NAMES, checkpoints

RUN_FILES = ("config.yaml", "metrics.jsonl", "attribution.csv", "selection.json")  # what a resume reads beside


class Mirror:
    """Makes `to` hold what the run's folder holds, whenever `update` is called.

    The newest checkpoint goes first. Its marker is written last, in one piece, so a copy is complete or none, as the
    checkpoints themselves are; what the run has dropped is dropped there after that. A failure is said and tried again
    on the next update; a call while a copy is under way makes one more round after it.
    """

    def __init__(self, run: Path, to: str, run_id: str | None, say: Callable[[str], object]):
        import fsspec

        try:
            self.fs, root = fsspec.core.url_to_fs(to)
        except (ImportError, ValueError) as error:
            raise UserError(f"train.copy_to={to}: {error}") from error
        self.run, self.root, self.to, self.say = run, root.rstrip("/"), to, say
        self._refuse_another_run(run_id)
        self.copying: str | None = None  # the tag that must not be dropped now
        self._lock, self._changed = threading.Lock(), False
        self._thread: threading.Thread | None = None  # None when nothing is under way

    def _refuse_another_run(self, run_id: str | None) -> None:
        """Its copies would be dropped, since this run does not hold them: the ones that a lost disk is replaced by."""
        try:
            for tag in self._complete():
                copied = json.loads(self.fs.cat_file(f"{self.root}/checkpoints/{tag}/{MARKER}"))["run"]
                if copied != run_id:
                    raise UserError(f"train.copy_to={self.to} holds {tag} of another run: choose a folder of its own")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"train.copy_to={self.to} cannot be read ({error})") from error

    def update(self) -> None:
        """Copy what is not there yet, in the background."""
        with self._lock:
            self._changed = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for the copy that is under way."""
        if (thread := self._thread) is not None:
            self.say(f"waiting for the copy to {self.to}")
            thread.join()

    def _work(self) -> None:
        if sys.platform == "linux":  # there, of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._lock:
                if not self._changed:
                    self._thread = None
                    return
                self._changed = False
            try:
                self._round()
            except Exception as error:  # a file system's own errors are many; training must not end for any of them
                self.say(f"the copy to {self.to} failed ({error}): tried again at the next save")
            self.copying = None

    def _round(self) -> None:
        here = checkpoints(self.run / "checkpoints")
        there = self._complete()
        for path in reversed(here):
            if path.name not in there:
                self._copy(path)
        for name in RUN_FILES:
            if (self.run / name).is_file():
                self._put(self.run / name, name)
        for name in NAMES:
            if (self.run / "checkpoints" / name).is_file():
                self._put(self.run / "checkpoints" / name, f"checkpoints/{name}")
        for tag in self._tags() - {path.name for path in checkpoints(self.run / "checkpoints")}:
            self._drop(tag)

    def _copy(self, path: Path) -> None:
        self.copying = path.name
        try:
            files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name != MARKER]
            for file in files:
                self._put(file, f"checkpoints/{path.name}/{file.name}")
            self._put(path / MARKER, f"checkpoints/{path.name}/{MARKER}")
        except FileNotFoundError:
            if path.is_dir():
                raise  # else the run has dropped it, and the next round drops what was copied

    def _put(self, file: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(file), f"{target}.part")
        self.fs.mv(f"{target}.part", target)

    def _tags(self) -> set[str]:
        folder = f"{self.root}/checkpoints"
        if not self.fs.isdir(folder):
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(folder, detail=False) if self.fs.isdir(path)}

    def _complete(self) -> set[str]:
        return {tag for tag in self._tags() if self.fs.isfile(f"{self.root}/checkpoints/{tag}/{MARKER}")}

    def _drop(self, tag: str) -> None:
        folder = f"{self.root}/checkpoints/{tag}"
        if self.fs.isfile(f"{folder}/{MARKER}"):
            self.fs.rm_file(f"{folder}/{MARKER}")
        self.fs.rm(folder, recursive=True)
