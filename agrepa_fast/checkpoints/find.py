"""Finding a checkpoint or an export, and telling whether it is whole.

A checkpoint is complete when its marker is there and every file has the size that the marker names. An export is a
folder of weights and settings with export.json in the marker's place.
"""

import json
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError

MARKER = "checkpoint.json"
EXPORT = "export.json"
POINTERS = ("latest", "best")  # files that name a checkpoint


def read_marker(path: Path) -> dict | None:
    """Return the content of a checkpoint's marker; None if it is missing or cannot be read."""
    try:
        return json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return None


def damage(path: Path) -> str | None:
    """Return the first fault of a checkpoint that has its marker; None if it is complete."""
    facts = read_marker(path)
    if facts is None:
        return f"{MARKER} cannot be read"
    for name, size in facts["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else "no"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a checkpoints folder, in the order in which they were saved."""
    paths = [path.parent for path in folder.glob(f"*/{MARKER}") if damage(path.parent) is None]
    return sorted(paths, key=lambda path: read_marker(path)["saved"])


def find_checkpoint(run: Path, name: str, say: Callable[[str], object] = lambda line: None) -> Path:
    """Return a complete checkpoint of a run by its tag, or by `latest` or `best`. If the crash of a machine has damaged
    the newest one, `latest` is the newest that is whole, and `say` is told. Raises UserError if there is none."""
    folder = run / "checkpoints"
    whole = complete_checkpoints(folder)
    if not whole and (damaged := sorted(path.parent for path in folder.glob(f"*/{MARKER}"))):
        raise UserError(f"{damaged[-1]} is damaged: {damage(damaged[-1])}; no checkpoint of {run} is whole")
    if not whole:
        raise UserError(f"{run} has no checkpoint to resume: it ended before its first train.save_every steps")
    tag = (folder / name).read_text().strip() if name in POINTERS and (folder / name).is_file() else name
    if folder / tag in whole:
        return folder / tag
    fault = damage(folder / tag) if (folder / tag / MARKER).is_file() else None
    if name == "latest":
        if fault is not None:
            say(f"{folder / tag} is damaged ({fault}): {whole[-1].name} is the newest that is whole")
        return whole[-1]
    if fault is not None:
        raise UserError(f"{folder / tag} is damaged: {fault}; whole are {', '.join(path.name for path in whole)}")
    raise UserError(f"{run} has no checkpoint {name!r}: there are {', '.join(path.name for path in whole)}")


def resolve_checkpoint(path: Path) -> Path:
    """Return the folder of a checkpoint or an export, from itself, from checkpoints/latest or best, or from a run's
    folder (its newest checkpoint). Raises UserError if `path` is none of these."""
    if (path / "checkpoints").is_dir():
        return find_checkpoint(path, "latest")
    if path.parent.name == "checkpoints" and (path.name in POINTERS or (path / MARKER).is_file()):
        return find_checkpoint(path.parent.parent, path.name)
    if not (path / "config.yaml").is_file() or not any((path / name).is_file() for name in (MARKER, EXPORT)):
        raise UserError(
            f"{path} is no checkpoint: give runs/<run>, runs/<run>/checkpoints/<tag>, or an export's folder"
        )
    return path


def step_of(path: Path) -> int:
    """Return the optimizer step of a checkpoint or an export."""
    name = MARKER if (path / MARKER).is_file() else EXPORT
    return json.loads((path / name).read_text())["step"]
