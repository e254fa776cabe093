"""Reading checkpoints and exports: safetensors and yaml, without DeepSpeed and without pickle.

A checkpoint is complete when its marker is there and every file has the size that the marker says. An export is a
folder of model.safetensors, config.yaml, heads.safetensors (alignment heads and BiT-C's projections), selection.json,
and export.json: whose weights they are, and the features, tokens and teachers that they were trained on.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import Config
from ..config_file import load_config, save_config
from ..errors import UserError
from ..files import write_atomically
from ..models.audio_dit.dit import AudioDiT

MARKER = "checkpoint.json"
EXPORT = "export.json"
NAMES = ("latest", "best")  # files that name a checkpoint


def marker(path: Path) -> dict | None:
    """What the marker of a checkpoint says; None when there is none that can be read."""
    try:
        return json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint that has its marker; None when it is complete."""
    said = marker(path)
    if said is None:
        return f"{MARKER} cannot be read"
    for name, size in said["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else "no"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a checkpoints folder, in the order in which they were saved."""
    paths = [path.parent for path in folder.glob(f"*/{MARKER}") if damage(path.parent) is None]
    return sorted(paths, key=lambda path: marker(path)["saved"])


def find_checkpoint(run: Path, name: str, say: Callable[[str], object] = lambda line: None) -> Path:
    """A complete checkpoint of a run by tag, or `latest` or `best`. Where a machine's crash damaged the newest one,
    `latest` is the newest that is whole, and `say` is told. Raises UserError when there is none."""
    folder = run / "checkpoints"
    whole = checkpoints(folder)
    if not whole:
        raise UserError(f"{run} has no checkpoint to resume: it ended before its first train.save_every steps")
    tag = (folder / name).read_text().strip() if name in NAMES and (folder / name).is_file() else name
    if folder / tag in whole:
        return folder / tag
    wrong = damage(folder / tag) if (folder / tag / MARKER).is_file() else None
    if name == "latest":
        if wrong is not None:
            say(f"{folder / tag} is damaged ({wrong}): {whole[-1].name} is the newest that is whole")
        return whole[-1]
    if wrong is not None:
        raise UserError(f"{folder / tag} is damaged: {wrong}; whole are {', '.join(path.name for path in whole)}")
    raise UserError(f"{run} has no checkpoint {name!r}: there are {', '.join(path.name for path in whole)}")


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint or an export, from itself, from checkpoints/latest or best, or from a run's folder
    (its newest one). Raises UserError when it is none of these."""
    if (path / "checkpoints").is_dir():
        return find_checkpoint(path, "latest")
    if path.parent.name == "checkpoints" and (path.name in NAMES or (path / MARKER).is_file()):
        return find_checkpoint(path.parent.parent, path.name)
    if not (path / "config.yaml").is_file() or not any((path / name).is_file() for name in (MARKER, EXPORT)):
        raise UserError(
            f"{path} is no checkpoint: give runs/<run>, runs/<run>/checkpoints/<tag>, or an export's folder"
        )
    return path


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint or an export."""
    name = MARKER if (path / MARKER).is_file() else EXPORT
    return json.loads((path / name).read_text())["step"]


def weights_file(path: Path, live: bool = False) -> Path:
    """The safetensors of a checkpoint or an export: averaged weights unless `live`. Raises UserError when it has no
    such weights."""
    file = path / ("model.safetensors" if live else "ema.safetensors")
    if (path / EXPORT).is_file():
        exported = json.loads((path / EXPORT).read_text())["weights"]
        if live and exported != "live":
            raise UserError(f"{path} is an export of averaged weights: the live ones are in the run's checkpoint")
        file = path / "model.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: {file.name} is missing")
    return file


def load_model(path: str | Path, *, live: bool = False) -> tuple[AudioDiT, Config]:
    """The model of a run, a checkpoint or an export, in evaluation mode on the CPU, with its configuration.

    Averaged weights unless `live`. Raises UserError when weights and configuration do not fit each other.
    """
    path = resolve_checkpoint(Path(path))
    config = load_config(path / "config.yaml")
    model = AudioDiT(config.model)
    load_weights(model, weights_file(path, live), "its config.yaml")
    return model.eval(), config


def load_weights(model: AudioDiT, weights: Path, wanted: str) -> None:
    """Fill the model from a safetensors file, one weight at a time, partitioned or not; every rank must call it. Raises
    UserError naming the first weight that is not as in `wanted`, and for a file that is none."""
    from ..zero.construction import gathered, whole_shape

    parameters = dict(model.named_parameters())
    with _open(weights) as file, torch.no_grad():
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name in sorted(parameters.keys() | there.keys()):
            here = whole_shape(parameters[name]) if name in parameters else None
            if there.get(name, "missing") != here:
                raise UserError(
                    f"{weights}: another architecture than {wanted}, {name} is {there.get(name, 'missing')}, not {here}"
                )
        for name, parameter in parameters.items():
            with gathered([parameter]):
                parameter.data.copy_(file.get_tensor(name))


def load_projections(path: Path) -> dict[str, torch.Tensor]:
    """Domain -> weight (E, token_dim) of BiT-C's projections in a checkpoint; {} when it was trained without."""
    file = path / "heads.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: {file.name} is missing")
    with _open(file) as weights:
        names = [name for name in weights.keys() if name.startswith("bitc.")]  # noqa: SIM118
        return {name.split(".")[1]: weights.get_tensor(name) for name in names}


def _open(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file ({error}): take it from another checkpoint") from error


def export(path: Path, out: Path, *, live: bool = False) -> None:
    """Write the weights of a checkpoint and what `load_model` needs to a new folder. Raises UserError when `out` holds
    something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty: choose a new folder")
    _, config = load_model(path, live=live)  # so that nothing is exported that does not load
    facts = {"step": step_of(path), "weights": "live" if live else "averaged"}
    for name in ("shards", "selection"):
        file = path / f"{name}.json"
        facts[name] = json.loads(file.read_text()) if file.is_file() else None
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights_file(path, live), out / "model.safetensors")
    for name in ("heads.safetensors", "selection.json"):
        if (path / name).is_file():
            shutil.copyfile(path / name, out / name)
    save_config(config, out / "config.yaml")
    write_atomically(out / EXPORT, json.dumps(facts, indent=1) + "\n")  # last: without it the folder is no export
