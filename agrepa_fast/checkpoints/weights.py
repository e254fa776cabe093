"""Weights in and out: safetensors and yaml, without DeepSpeed and without pickle.

An export is a folder of model.safetensors, config.yaml, heads.safetensors (alignment heads and BiT-C's projections),
selection.json, and export.json: averaged weights or live ones, and the features, tokens and teachers of the training.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import Config
from ..config_file import load_config, save_config
from ..errors import UserError
from ..files import check_writable, read_json, write_atomically
from ..models.backbone import Backbone
from ..models.registry import make_model
from ..tensor_files import open_tensors
from .find import EXPORT, REMEDY, generation_of, read_facts, resolve_checkpoint, step_of

_REMEDY = "take it from another checkpoint"


def load_model(path: str | Path, *, live: bool = False) -> tuple[Backbone, Config]:
    """Return the model of a run, a checkpoint or an export, in evaluation mode on the CPU, and its configuration.

    Averaged weights unless `live`. Raises UserError if weights and configuration do not fit each other.
    """
    path = resolve_checkpoint(Path(path))
    config = load_config(path / "config.yaml")
    if None in (config.model.n_mels, config.model.vocab):
        raise UserError(f"{path}/config.yaml is no checkpoint's: it has no model.n_mels or model.vocab")
    model = make_model(config.model, config.flow.prediction)
    load_weights(model, weights_file(path, live), "its config.yaml")
    return model.eval(), config


def load_weights(model: Backbone, weights: Path, source: str) -> None:
    """Fill the model from a safetensors file, one weight at a time, partitioned or not. Every rank must call it.

    source: the run or configuration that the model was made from, as a message names it. Raises UserError naming the
    first weight whose shape differs, and for a file that is no whole safetensors file.
    """
    with open_tensors(weights, _REMEDY) as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        fill(model, stored, file.get_tensor, f"{weights}: another architecture than {source}")


@torch.no_grad()
def fill(model: Backbone, shapes: dict[str, tuple], tensor: Callable[[str], torch.Tensor], fault: str) -> None:
    """Fill the model's weights and buffers, one at a time, with the tensor of each name; shapes: of all tensors.

    Raises UserError, which begins with `fault`, naming the first that is missing, unknown or of another shape.
    """
    from ..zero.construction import gathered, whole_shape
    from ..zero.masters import untrained_tensors

    parameters = dict(model.named_parameters()) | untrained_tensors(model)
    for name in sorted(parameters.keys() | shapes.keys()):
        expected = whole_shape(parameters[name]) if name in parameters else "none of its weights"
        found = shapes.get(name, "missing")
        if found != expected:
            raise UserError(f"{fault}, {name} is {found}, not {expected}")
    for name, parameter in parameters.items():
        with gathered([parameter]):
            parameter.data.copy_(tensor(name))


def load_projections(path: Path) -> dict[str, torch.Tensor]:
    """Return domain -> weight (E, token_dim) of BiT-C's projections in a checkpoint; {} if it was trained without."""
    file = path / "heads.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: {file.name} is missing")
    with open_tensors(file, _REMEDY) as weights:
        names = [name for name in weights.keys() if name.startswith("bitc.")]  # noqa: SIM118
        return {name.split(".")[1]: weights.get_tensor(name) for name in names}


def weights_file(path: Path, live: bool = False) -> Path:
    """Return the safetensors file of a checkpoint or an export: averaged weights unless `live`. Raises UserError if it
    has no such weights."""
    file = path / ("model.safetensors" if live else "ema.safetensors")
    if (path / EXPORT).is_file():
        exported = read_facts(path / EXPORT, "weights")
        if live and exported != "live":
            raise UserError(f"{path} is an export of averaged weights: the live ones are in the run's checkpoint")
        file = path / "model.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: {file.name} is missing")
    return file


def export(path: Path, out: Path, *, live: bool = False) -> None:
    """Write the weights of a checkpoint, and the files that `load_model` reads, to a new folder. Raises UserError if
    `out` is not empty or cannot be written. An export that fails leaves none of its files."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty: choose a new folder")
    check_writable(out, "--out")
    _, config = load_model(path, live=live)  # so that nothing is exported that does not load
    of_export = read_facts(path / EXPORT, "weights") if (path / EXPORT).is_file() else None
    facts = {"step": step_of(path), "weights": of_export or ("live" if live else "averaged")}
    facts["generation"] = generation_of(path)
    for name in ("shards", "selection"):
        file = path / f"{name}.json"
        facts[name] = read_json(file, REMEDY) if file.is_file() else None
    out.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(weights_file(path, live), out / "model.safetensors")
        for name in ("heads.safetensors", "selection.json"):
            if (path / name).is_file():
                shutil.copyfile(path / name, out / name)
        save_config(config, out / "config.yaml")
        write_atomically(out / EXPORT, json.dumps(facts, indent=1) + "\n")  # last: without it the folder is no export
    except BaseException:
        for file in out.iterdir():
            file.unlink()
        raise
