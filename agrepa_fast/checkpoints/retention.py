"""Old checkpoints: which of them stay, and how the others go."""

import math
import shutil
from pathlib import Path

from ..zero.recut import FOLDER as UNIVERSAL
from .find import MARKER, TAG, complete_checkpoints, read_marker


def best_checkpoints(folder: Path, count: int) -> list[Path]:
    """Return the `count` checkpoints with the lowest validation flow loss, the lowest first. Several saves may share
    one validation: the first of them counts as better."""
    scored = [(read_marker(path)["val/flow_loss"], path) for path in own_checkpoints(folder)]
    scored = [(score, path) for score, path in scored if score is not None and not math.isnan(score)]
    ranked = sorted(scored, key=lambda pair: pair[0])  # stable, and they are in the order of their saves
    return [path for _, path in ranked[:count]]


def remove_old(folder: Path, keep: int, keep_best: int, uploading: str | None = None) -> None:
    """Remove all checkpoints but the `keep` newest, the `keep_best` best, and the tag that is being uploaded. Universal
    checkpoints go too: the run has saved since it needed them."""
    saved = own_checkpoints(folder)
    kept = [*saved[-keep:], *best_checkpoints(folder, keep_best)]
    for path in saved:
        if path not in kept and path.name != uploading:
            remove_checkpoint(path)
        shutil.rmtree(path / UNIVERSAL, ignore_errors=True)


def remove_interrupted(folder: Path) -> None:
    """Remove the folders of saves that were cut short: those without a marker."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _is_ours(path) and not (path / MARKER).is_file():
                shutil.rmtree(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its marker first: a part of it must never look complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def own_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints that saves have made, in their order."""
    return [path for path in complete_checkpoints(folder) if _is_ours(path)]


def _is_ours(path: Path) -> bool:
    """Whether a save made the folder. A copy that the user put beside it, or a link, is not ours to remove."""
    return TAG.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()
