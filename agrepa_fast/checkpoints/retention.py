"""Old checkpoints: which of them stay, and how the others go."""

import math
import shutil
from pathlib import Path

from ..zero.recut import FOLDER as UNIVERSAL
from .find import MARKER, TAG, complete_checkpoints


def best_checkpoints(folder: Path, count: int, validated_on: dict) -> list[Path]:
    """Return the `count` checkpoints with the lowest validation flow loss, the lowest first, of those that were
    validated on the same as the run is now; of all until there is one. Several saves may share one validation: the
    first of them counts as better."""
    scored = [(path, facts) for path, facts in own_checkpoints(folder).items() if not math.isnan(_score(facts))]
    comparable = [(path, facts) for path, facts in scored if is_comparable(facts, validated_on)]
    ranked = sorted(comparable or scored, key=lambda pair: _score(pair[1]))  # stable, in the order of their saves
    return [path for path, _ in ranked[:count]]


def _score(facts: dict) -> float:
    score = facts["val/flow_loss"]
    return math.nan if score is None else score


def is_comparable(facts: dict, validated_on: dict) -> bool:
    """Whether the validation loss in a marker was measured on these clips and times. Older markers do not say it."""
    return facts.get("validated_on", validated_on) == validated_on


def remove_old(folder: Path, keep: int, keep_best: int, validated_on: dict, uploading: str | None = None) -> None:
    """Remove all checkpoints but the `keep` newest, the `keep_best` best, and the tag that is being uploaded. Universal
    checkpoints go too: the run has saved since it needed them."""
    saved = [*own_checkpoints(folder)]
    kept = [*saved[-keep:], *best_checkpoints(folder, keep_best, validated_on)]
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


def own_checkpoints(folder: Path) -> dict[Path, dict]:
    """Return the complete checkpoints that saves have made and their markers, in their order."""
    return {path: facts for path, facts in complete_checkpoints(folder).items() if _is_ours(path)}


def _is_ours(path: Path) -> bool:
    """Whether a save made the folder. A copy that the user put beside it, or a link, is not ours to remove."""
    return TAG.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()
