"""A copy of a run's checkpoints, made in the background on another disk or in an object store (fsspec)."""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..files import check_writable
from .find import MARKER, POINTERS, complete_checkpoints

RUN_FILES = ("config.yaml", "metrics.jsonl", "attribution.csv", "selection.json")  # a resume reads them, too


class Mirror:
    """Copies the run's checkpoints to `to` at every `update`, and removes there those that the run has removed.

    The newest checkpoint goes first. Its marker goes last and in one piece, so a copy is complete or no checkpoint at
    all. After a failure `say` is told, and the next update or `close` tries again. An update while a copy is under way
    starts another round after it.
    """

    def __init__(self, run: Path, to: str, run_id: str | None, say: Callable[[str], object]):
        import fsspec
        import fsspec.implementations.local

        try:
            self.fs, root = fsspec.core.url_to_fs(to)
        except (ImportError, ValueError) as error:
            raise UserError(f"train.copy_to={to}: {error}") from error
        self.run, self.root, self.to, self.say = run, root.rstrip("/"), to, say
        if isinstance(self.fs, fsspec.implementations.local.LocalFileSystem):
            check_writable(Path(self.root), "train.copy_to")
        self._refuse_another_run(run_id)
        self.copying: str | None = None  # the tag that the run must not remove now
        self._lock, self._changed = threading.Lock(), False
        self._failed = False  # the last round
        self._thread: threading.Thread | None = None  # None while nothing is copied

    def _refuse_another_run(self, run_id: str | None) -> None:
        """Raise UserError if `to` holds checkpoints of another run: this one would remove them, and they may replace a
        lost disk."""
        try:
            for tag in self._complete():
                copied = json.loads(self.fs.cat_file(f"{self.root}/checkpoints/{tag}/{MARKER}"))["run"]
                if copied != run_id:
                    raise UserError(f"train.copy_to={self.to} holds {tag} of another run: choose a folder of its own")
        except UserError:
            raise
        except Exception as error:  # file systems have errors of their own, of missing credentials for one
            raise UserError(f"train.copy_to={self.to} cannot be read ({error})") from error

    def update(self) -> None:
        """Start to copy the checkpoints and files that are not there yet, and return."""
        with self._lock:
            self._changed = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for the copy that is under way. One that fails is tried once more: no save follows."""
        self._wait()
        if self._failed:
            self.update()
            self._wait()
        if self._failed:
            self.say(f"the copy to {self.to} is incomplete: copy {self.run} there yourself")

    def _wait(self) -> None:
        if (thread := self._thread) is not None:
            self.say(f"waiting for the copy to {self.to}")
            thread.join()

    def _work(self) -> None:
        if sys.platform == "linux":  # elsewhere it would lower the priority of the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._lock:
                if not self._changed:
                    self._thread = None
                    return
                self._changed = False
            try:
                self._round()
                self._failed = False
            except Exception as error:  # file systems have errors of their own; training goes on after any
                self._failed = True
                self.say(f"the copy to {self.to} failed ({error}): tried again at the next save, or at the end")
            self.copying = None

    def _round(self) -> None:
        saved = complete_checkpoints(self.run / "checkpoints")
        copied = self._complete()
        for path in reversed(saved):
            if path.name not in copied:
                self._copy(path)
        for name in RUN_FILES:
            if (self.run / name).is_file():
                self._put(self.run / name, name)
        for name in POINTERS:
            if (self.run / "checkpoints" / name).is_file():
                self._put(self.run / "checkpoints" / name, f"checkpoints/{name}")
        for tag in self._tags() - {path.name for path in complete_checkpoints(self.run / "checkpoints")}:
            self._remove(tag)

    def _copy(self, path: Path) -> None:
        self.copying = path.name
        try:
            files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name != MARKER]
            for file in files:
                self._put(file, f"checkpoints/{path.name}/{file.name}")
            self._put(path / MARKER, f"checkpoints/{path.name}/{MARKER}")
        except FileNotFoundError:
            if path.is_dir():
                raise  # else the run has removed it: the next round removes the part that was copied

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

    def _remove(self, tag: str) -> None:
        folder = f"{self.root}/checkpoints/{tag}"
        if self.fs.isfile(f"{folder}/{MARKER}"):
            self.fs.rm_file(f"{folder}/{MARKER}")
        self.fs.rm(folder, recursive=True)
