"""Weight files of the packages that models come from: in by train.start_from, out by `agrepa export --upstream`."""

import pickle
import sys
import zipfile
from pathlib import Path

import torch

from ..config import Config
from ..errors import UserError, one_line
from ..files import check_readable, check_writable, replace_file
from ..models.backbone import Backbone
from ..tensor_files import open_tensors
from .weights import fill, load_model

_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_SUFFIXES = (".safetensors", *_PICKLED)
_INSIDE = ("ema_model_state_dict", "model_state_dict", "state_dict", "model")  # where a training's file has the weights


def is_upstream_file(path: Path) -> bool:
    """Whether train.start_from names a weight file instead of a run, a checkpoint or an export."""
    return path.suffix in _SUFFIXES and not path.is_dir()


def start_from_upstream(model: Backbone, path: Path) -> str:
    """Fill the model from a weight file of the package that it comes from, partitioned or not, and return a line about
    it. Every rank must call it.

    Raises UserError for a file that holds more than tensors or is damaged, and names the first weight that the model
    lacks, misses, or has in another shape.
    """
    if model.predicts == "x":
        raise UserError(f"train.start_from={path}: its model predicts the velocity: leave flow.prediction=x out")
    state = model.from_upstream(read_tensors(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    fill(model, shapes, state.__getitem__, f"{path}: not the weights of this {type(model).__name__}")
    return f"train.start_from: {len(state)} tensors of {path}, read as {model.upstream}"


def other_settings(model: Backbone, config: Config) -> str | None:
    """Return a warning if weights of the model's package mean other mels or noise than those of a run, else None."""
    sections = [(name, *name.split("."), wanted) for name, wanted in model.upstream_settings.items()]
    differing = [
        f"{name}={wanted}" for name, part, own, wanted in sections if getattr(getattr(config, part), own) != wanted
    ]
    if not differing:
        return None
    return f"warning: its package's weights are of {' and '.join(differing)}, and this run's are not"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file, or of a .pt that holds nothing else, on the CPU. Of a file that a
    training wrote, the averaged weights, or else the live ones. Raises UserError."""
    if path.suffix == ".safetensors":
        with open_tensors(path, "download it again") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_readable(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds Python objects, which could run code: save its state dict alone, as .safetensors"
        ) from error
    except Exception as error:  # of torch and pickle, for bytes that torch.save did not write
        reason = one_line(error)[:160]
        raise UserError(f"{path} is no whole file of torch.save ({reason}): download it again") from error
    content = next((content[name] for name in _INSIDE if isinstance(content, dict) and name in content), content)
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no weights by name")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def export_upstream(checkpoint: Path, out: Path, *, live: bool = False) -> None:
    """Write the weights of a checkpoint as the package that the model comes from reads them. Raises UserError if `out`
    exists, cannot be written or has another suffix than that package's files; nothing is written then."""
    if out.exists():
        raise UserError(f"--out {out} exists: choose a new file")
    check_writable(out.parent, "--out")
    model, config = load_model(checkpoint, live=live)
    if model.predicts == "x":
        raise UserError("--upstream: models of other packages predict the velocity, and this one the clean mel (x)")
    content = model.to_upstream(dict(model.state_dict()))
    if out.suffix != model.upstream_suffix:
        raise UserError(f"--out {out}: {type(model).__name__}'s package reads {model.upstream_suffix} files")
    if (warning := other_settings(model, config)) is not None:
        print(warning, file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(out) as file:
        if out.suffix in _PICKLED:
            torch.save(content, file)
        else:
            from safetensors.torch import save

            file.write(save({name: tensor.contiguous() for name, tensor in content.items()}))
