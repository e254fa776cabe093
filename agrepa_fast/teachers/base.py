"""What all teachers share: the interface, the spec's syntax, the name in file names, the hash of the weights."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch

from ..config import UserError

_MAY_LACK = ("decoder.", "masked_spec_embed")  # a Whisper's decoder, wav2vec 2.0's training mask: not used here


class Teacher(ABC):
    """A frozen audio encoder, fp32 and in evaluation mode.

    name         slug [a-z0-9_]+ for file names, with the layer: whisper_base_l3
    dim          width of a frame
    rate         frames per second
    sample_rate  Hz, of the waves it takes
    identity     what must be equal for two sets of frames to be comparable: spec, class, layer, sha256 of the weights,
                 and licence, package and version where they are known
    """

    name: str
    dim: int
    rate: float
    sample_rate: int
    identity: dict

    @abstractmethod
    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves (samples,) float32 at `sample_rate`, of any lengths -> per wave (frames, dim) float32.

        Only frames that cover the recording, and the same ones whatever else is in the list (to about 1e-5 of their
        size). Raises ValueError for an empty wave and for one that is not 1-D.
        """


def split_layer(spec: str) -> tuple[str, int | None]:
    """`name@4` -> (`name`, 4); without a suffix, or where a folder of the whole name exists, (spec, None)."""
    base, at, layer = spec.rpartition("@")
    if not at or Path(spec).expanduser().is_dir():
        return spec, None
    if not base or not re.fullmatch("[1-9][0-9]*", layer):
        raise UserError(f"teacher {spec!r}: what follows @ is a layer, counted from 1, such as {base or 'NAME'}@4")
    return base, int(layer)


def check_layer(spec: str, layer: int | None, depth: int) -> None:
    if layer is not None and layer > depth:
        raise UserError(f"teacher {spec!r} has layers 1 to {depth}: choose one of them, or leave the @ out for the end")


def slug(base: str, layer: int | None) -> str:
    """The name in `<key>.<name>.npy`: `openai/whisper-large-v3`, 4 -> whisper_large_v3_l4."""
    last = Path(base.removeprefix("package:")).name.lower()
    name = re.sub("[^a-z0-9]+", "_", last).strip("_") or "teacher"
    return name if layer is None else f"{name}_l{layer}"


def weights_sha256(module: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and float values, so that it does not depend on the file format they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_waves(waves: list[np.ndarray]) -> None:
    for index, wave in enumerate(waves):
        if wave.ndim != 1 or len(wave) == 0:
            raise ValueError(f"wave {index} has shape {wave.shape}: (samples,) with at least one sample is wanted")


def batches_by_length(lengths: list[int], room: int, equal: bool = False) -> Iterator[list[int]]:
    """Indices sorted by length, in groups whose padded size is at most `room`; with `equal`, of one length each."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        grown = (len(group) + 1) * lengths[index] > room
        if group and (grown or (equal and lengths[index] != lengths[group[0]])):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def load_weights(model_class, source: str, spec: str):
    """model_class.from_pretrained(source) in fp32 and evaluation mode; UserError unless it fills the whole encoder."""
    from safetensors import SafetensorError

    try:
        model, report = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (SafetensorError, RuntimeError, UnpicklingError) as error:  # cut off; other shapes; more than weights
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"teacher {spec!r}: its weights cannot be read ({reason}): save or download it again"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(_MAY_LACK))
    if missing:
        raise UserError(
            f"teacher {spec!r}: its weights lack {missing[0]} ({len(missing)} of {model_class.__name__}'s):"
            f" save the whole model with save_pretrained"
        )
    return model.eval().requires_grad_(False)
