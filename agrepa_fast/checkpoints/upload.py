"""A copy of a run's checkpoints, made in the background on another disk or in an object store (fsspec)."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..files import check_writable
from .find import MARKER, POINTERS, TAG
from .retention import own_checkpoints

CONFIG = "config.yaml"
RUN_FILES = (CONFIG, "metrics.jsonl", "attribution.csv", "selection.json")  # a resume reads them, too


class Mirror:
    """Copies the run's checkpoints to `to` at every `update`, and removes there those that the run has removed.

    config.yaml goes first: its run.id keeps other runs out. The newest checkpoint follows. Its marker goes last and in
    one piece, so a copy is complete or no checkpoint at all. After a failure `say` is told, and the next update or
    `close` tries again. An update while a copy is under way starts another round after it.
    """

    def __init__(self, run: Path, to: str, run_id: str | None, say: Callable[[str], object]):
        import fsspec
        import fsspec.implementations.local

        try:
            self.fs, root = fsspec.core.url_to_fs(to)
        except (ImportError, ValueError) as error:
            raise UserError(f"train.copy_to={to}: {error}") from error
        self.run, self.root, self.to, self.say = run, root.rstrip("/"), to, say
        self._run_id = str(run_id).encode()
        if isinstance(self.fs, fsspec.implementations.local.LocalFileSystem):
            self._refuse_own_folder()
            check_writable(Path(self.root), "train.copy_to")
        self._refuse_another_run()
        self.copying: str | None = None  # the tag that the run must not remove now
        self._lock, self._changed = threading.Lock(), False
        self._failed = False  # the last round
        self._thread: threading.Thread | None = None  # None while nothing is copied

    def _refuse_own_folder(self) -> None:
        """Raise UserError if copies would replace or remove files that the run writes. A run that goes on from its copy
        still has the copy's folder in its settings."""
        here, there = self.run.resolve(), Path(self.root).resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise UserError(
                f"train.copy_to={self.to} is run.dir={self.run}, or inside or around it: set train.copy_to=null or "
                "another folder"
            )

    def _refuse_another_run(self) -> None:
        """Raise UserError if `to` holds files of another run: this one would replace or remove them, and they may
        replace a lost disk."""
        try:
            self.fs.invalidate_cache()  # another run may have come since the last listing
            config = self._read(CONFIG)
            foreign = [CONFIG] if config is not None and self._run_id not in config else []
            foreign += [tag for tag in sorted(self._tags()) if not self._is_ours(tag)]
        except Exception as error:  # file systems have errors of their own, of missing credentials for one
            raise UserError(f"train.copy_to={self.to} cannot be read ({error})") from error
        if foreign:
            raise UserError(f"train.copy_to={self.to} holds {foreign[0]} of another run: choose a folder of its own")

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

    def leave(self) -> None:
        """Say whether the copy is incomplete, and wait for nothing."""
        if self._thread is not None or self._failed:
            self.say(f"the copy to {self.to} is incomplete: --resume completes it")

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
        self._refuse_another_run()
        here = self.run / "checkpoints"
        for name in RUN_FILES:
            if (self.run / name).is_file():
                self._put(self.run / name, name)
        for path in reversed(own_checkpoints(here)):
            self._copy(path)
        for name in POINTERS:
            if (here / name).is_file():
                self._put(here / name, f"checkpoints/{name}")
            elif self.fs.isfile(f"{self.root}/checkpoints/{name}"):
                self.fs.rm_file(f"{self.root}/checkpoints/{name}")
        for tag in self._tags():
            if not (here / tag).exists() and self._is_ours(tag):
                self._remove(tag)

    def _copy(self, path: Path) -> None:
        """Copy a checkpoint, unless its copy is complete."""
        self.copying, marker = path.name, f"checkpoints/{path.name}/{MARKER}"
        try:
            copied = self._read(marker)
            if copied == (path / MARKER).read_bytes():
                return
            if copied is not None:  # of a save of the same name, before the run went on from an older checkpoint
                self.fs.rm_file(f"{self.root}/{marker}")
            files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name != MARKER]
            for file in files:
                self._put(file, f"checkpoints/{path.name}/{file.name}")
            self._put(path / MARKER, marker)
        except FileNotFoundError:
            if (path / MARKER).is_file():
                raise  # else the run has removed it: the next round removes the part that was copied

    def _read(self, name: str) -> bytes | None:
        """Return the content of a copied file, None if it is missing."""
        path = f"{self.root}/{name}"
        return self.fs.cat_file(path) if self.fs.isfile(path) else None

    def _put(self, file: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(file), f"{target}.part")
        self.fs.mv(f"{target}.part", target)

    def _tags(self) -> set[str]:
        """Return the names of the copies, complete or not. Other folders beside them belong to somebody else."""
        folder = f"{self.root}/checkpoints"
        if not self.fs.isdir(folder):
            return set()
        names = {path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(folder, detail=False)}
        return {name for name in names if TAG.fullmatch(name) and self.fs.isdir(f"{folder}/{name}")}

    def _is_ours(self, tag: str) -> bool:
        """Whether this run has made a copy: its marker names the run, and config.yaml does so before the marker."""
        return self._run_id in (self._read(f"checkpoints/{tag}/{MARKER}") or self._read(CONFIG) or b"")

    def _remove(self, tag: str) -> None:
        folder = f"{self.root}/checkpoints/{tag}"
        if self.fs.isfile(f"{folder}/{MARKER}"):
            self.fs.rm_file(f"{folder}/{MARKER}")
        self.fs.rm(folder, recursive=True)
