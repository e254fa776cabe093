"""Find a checkpoint or an export, and tell whether it is whole.

A checkpoint is complete when its marker is there and every file has the size that the marker names. An export is a
folder of weights and settings with export.json in the marker's place.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config_file import load_config
from ..errors import UserError
from ..files import read_json

MARKER = "checkpoint.json"
EXPORT = "export.json"
TAG = re.compile(r"step\d{8,}(-\d+)?")  # the name of a folder that a save makes
POINTERS = ("latest", "best")  # files that name a checkpoint
REMEDY = "take another checkpoint, or export it again"  # of a damaged marker or export.json


def read_marker(path: Path) -> dict | None:
    """Return the content of a checkpoint's marker; None if it is missing or no marker. Raises UserError if the file
    system does not let it be read."""
    try:
        facts = json.loads((path / MARKER).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise UserError(f"{path / MARKER} cannot be read: {error.strerror}") from error
    kinds = {"saved": int | float, "step": int, "files": dict}
    whole = isinstance(facts, dict) and all(isinstance(facts.get(name), kind) for name, kind in kinds.items())
    return facts if whole else None


def damage(path: Path) -> str | None:
    """Return the first fault of a checkpoint that has its marker; None if it is complete."""
    facts = read_marker(path)
    return f"{MARKER} is damaged" if facts is None else _damaged_file(path, facts)


def _damaged_file(path: Path, facts: dict) -> str | None:
    """Return the first file of a checkpoint whose size is not that in its marker; None if all sizes are right."""
    for name, size in facts["files"].items():
        try:
            found = (path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError, ValueError):
            found = "no"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


def complete_checkpoints(folder: Path) -> dict[Path, dict]:
    """Return the complete checkpoints of a checkpoints folder and their markers, in the order in which they were saved.
    One that is removed meanwhile may be among them, or not."""
    marked = [(path, read_marker(path)) for path in _marked(folder)]
    whole = [(path, facts) for path, facts in marked if facts is not None and _damaged_file(path, facts) is None]
    return dict(sorted(whole, key=lambda pair: pair[1]["saved"]))


def _marked(folder: Path) -> list[Path]:
    """Return the checkpoints that have a marker. Raises UserError for a folder that exists and cannot be listed: a glob
    would find nothing in it."""
    try:
        return sorted(path for path in folder.iterdir() if (path / MARKER).is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def find_checkpoint(run: Path, name: str, say: Callable[[str], object] = lambda line: None) -> Path:
    """Return a complete checkpoint of a run by its tag, or by `latest` or `best`. If the crash of a machine has damaged
    the newest one, `latest` is the newest that is whole, and `say` is told. Raises UserError if there is none."""
    folder = run / "checkpoints"
    whole = [*complete_checkpoints(folder)]
    if not whole and (damaged := _marked(folder)):
        raise UserError(f"{damaged[-1]} is damaged: {damage(damaged[-1])}; no checkpoint of {run} is whole")
    if not whole:
        raise UserError(f"{run} has no checkpoint to resume: it ended before its first train.save_every steps")
    tag = name
    if name in POINTERS and (folder / name).is_file():
        tag = (folder / name).read_text(errors="replace").strip()
    if folder / tag in whole:
        return folder / tag
    fault = damage(folder / tag) if folder / tag in _marked(folder) else None
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
    return read_facts(_facts_file(path), "step")


def generation_of(path: Path) -> int:
    """Return how many runs had trained the weights of a checkpoint or an export before its own run did. Versions that
    do not record it draw as if it were 1 wherever train.start_from is set."""
    unrecorded = int(load_config(path / "config.yaml").train.start_from is not None)
    return read_facts(_facts_file(path), "generation", unrecorded)


def _facts_file(path: Path) -> Path:
    return path / (MARKER if (path / MARKER).is_file() else EXPORT)


def read_facts(file: Path, name: str, default: object = None) -> Any:
    """Return one entry of a marker or of an export.json. Raises UserError if the file cannot be read, or has no such
    entry and there is no default."""
    facts = read_json(file, REMEDY)
    if not isinstance(facts, dict) or (name not in facts and default is None):
        raise UserError(f"{file} is damaged (no {name!r}): {REMEDY}")
    return facts.get(name, default)
