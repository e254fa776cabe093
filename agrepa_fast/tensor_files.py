"""safetensors files: written with the modes that the umask gives, refused in one line."""

from pathlib import Path

import torch

from .errors import UserError
from .files import check_readable


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors as a safetensors file."""
    from safetensors.torch import save_file

    path.touch()  # with the mode of every other file; safetensors 0.8 makes files that their owner alone may read
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path)
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)


def open_tensors(path: Path, remedy: str):
    """Return an open safetensors file, for `with`. Raises UserError, which ends with `remedy`, for a file that is
    damaged or cannot be read."""
    from safetensors import SafetensorError, safe_open

    check_readable(path)  # safetensors calls every file that it cannot open missing
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): {remedy}") from error
