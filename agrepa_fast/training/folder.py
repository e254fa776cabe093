"""The folder of a run: its name, the checkpoint to go on from, and the files of an attempt that left no checkpoint."""

import time
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from ..checkpoints.find import MARKER, find_checkpoint
from ..config import Config
from ..errors import UserError
from ..files import FolderLock, check_writable
from ..ranks import agreeing, from_rank_0
from . import lost_clips, nonfinite

# Everything that training writes before its first checkpoint, except wandb/: W&B gives every run a folder in it.
_WRITTEN = ("config.yaml", "metrics.jsonl", "attribution.csv", "selection.json", nonfinite.FILE, lost_clips.FILE)
_WRITTEN += ("tensorboard", "profile")
_LOOKS = 10  # for a file of rank 0's, a second apart


def locate_run(config: Config, resume: str | None) -> tuple[Config, Path | None]:
    """Return the settings with run.dir and run.id, and the checkpoint to go on from, or None for a run that starts at
    step 0. The same on every rank; every rank must call it.

    Raises UserError if run.dir holds a run already and `resume` is None, has no checkpoint of that name, or cannot be
    written. A run that ended before its first save starts again, with `resume` "latest" too.
    """

    def locate() -> tuple[Config, Path | None]:
        run, identity = config.run, uuid4().hex
        # Runs may start in the same second, on machines that share the folder, and on file systems without locks.
        folder = Path(run.dir or f"runs/{run.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{identity[:6]}")
        checkpoint = _checkpoint(folder, resume)
        for place in (folder, folder / "checkpoints"):
            check_writable(place, "run.dir")
        if checkpoint is not None:
            identity = run.id
        return replace(config, run=replace(run, dir=str(folder), id=identity)), checkpoint

    return from_rank_0(locate)


def _checkpoint(folder: Path, resume: str | None) -> Path | None:
    saved = any(folder.glob(f"checkpoints/*/{MARKER}")) or (folder / "summary.json").exists()
    if not saved and resume in (None, "latest"):
        return None
    if resume is None:
        raise UserError(
            f"run.dir={folder} already holds a run: continue it with --resume latest, or choose another folder"
        )
    return find_checkpoint(folder, resume, print)


def open_folder(folder: Path, new: bool) -> FolderLock:
    """Create the folder of a run, or reopen it, and return its lock, which rank 0 holds. new: the run starts at step 0.
    Raises UserError if another process trains in the folder, or has left a run there that this one would begin again,
    or if this rank does not see rank 0's files in it. Every rank must call it."""
    lock = FolderLock(folder, "choose another run.dir")

    def create() -> Path:
        lock.acquire()
        if new:
            _checkpoint(folder, None)  # locate_run has looked without the lock, and maybe hours ago
        (folder / "plots").mkdir(exist_ok=True)
        sign = folder / f".sign-{uuid4().hex}"
        sign.touch()
        return sign

    sign = from_rank_0(create)
    try:
        with agreeing():
            if not _appears(sign):
                raise UserError(
                    f"run.dir={folder}: the files of rank 0 are not seen here: choose a folder on storage that all "
                    "nodes share"
                )
    finally:
        sign.unlink(missing_ok=True)
    return lock


def _appears(file: Path) -> bool:
    """Return whether a new file of rank 0's is seen here. Network file systems may show it seconds later."""
    for _ in range(_LOOKS):
        if file.exists():
            return True
        time.sleep(1)
    return False


def set_attempt_aside(folder: Path) -> None:
    """Move the files of an attempt that left no checkpoint to attempt-<n>/, and print that. Do nothing if there was no
    attempt. Rank 0 calls it for a run that starts at step 0, as late as it can."""
    if not (folder / "config.yaml").exists():
        return
    number = 1
    while (aside := folder / f"attempt-{number}").exists():
        number += 1
    aside.mkdir()
    for name in _WRITTEN:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    print(
        f"{folder} has no checkpoint, for training ended before its first save: it starts again from step 0; the files "
        f"of the attempt are in {aside}"
    )
