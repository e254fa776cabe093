"""The interface of teachers, and helpers that all of them use."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch

from ..errors import UserError
from ..fetch import check_home_cache
from ..files import local_path

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Not used here: the decoder of a WhisperModel, wav2vec 2.0's training mask, which is not in its authors' own weights.
_MAY_LACK = re.compile(r"decoder\..*|(\w+\.)?masked_spec_embed")


class Teacher(ABC):
    """A frozen audio encoder, fp32 and in evaluation mode.

    name         file_name [a-z0-9_]+ for file names, with the layer: whisper_base_l3
    dim          width of a frame
    rate         frames per second
    sample_rate  Hz, of the waves it takes
    start        frame i stands for the 1 / rate seconds from start + i / rate on; None: the frames cover the recording
    identity     must be equal for two sets of frames to be comparable: spec, class, layer, sha256 of the weights, start
                 unless it is None, and licence, package and version if they are known
    """

    name: str
    dim: int
    rate: float
    sample_rate: int
    start: float | None = None
    identity: dict

    @abstractmethod
    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Return (frames, dim) float32 per wave (samples,) float32 at `sample_rate`, of any lengths.

        Without a `start` the frames cover the recording, to a frame. With one they may begin before the recording's
        begin or after it, and end up to two frames before its end or one after it. Those of a wave do not depend on the
        others, except for rounding of about 1e-5 of their size. Raises ValueError for an empty wave, and for one that
        is not 1-D.
        """

    def attention_shape(self, layers: int, seconds: float) -> tuple[int, int, int, int]:
        """Return (layers, 2, heads, width), the queries and keys of a frame in the last `layers` layers that the
        teacher runs. Raises UserError if it cannot tell them for clips of up to `seconds`."""
        raise UserError(
            f"teacher {self.identity['spec']!r} cannot tell its queries and keys: choose a Whisper, or set "
            f"data.teacher_attention=null"
        )

    def frames_with_attention(self, waves: list[np.ndarray], layers: int) -> list[np.ndarray]:
        """Return (frames, dim + product of attention_shape) float32 per wave: its frames, each followed by its queries
        and keys. Their products over `width` are the scores of attention: queries are scaled already."""
        raise NotImplementedError(f"{type(self).__name__} cannot tell its queries and keys")

    def check_precision(self, spec: str) -> None:
        """Raise UserError if the encoder cannot compute in its precision on its device."""
        # Another length than those measured in fp32: wav2vec2-conformer keeps the rotary factors of the last one.
        wave = np.random.default_rng(0).standard_normal(self.sample_rate * 11 // 10).astype(np.float32) * 0.1
        try:
            frames = self.frames([wave])
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0][:120]
        else:
            if np.isfinite(frames[0]).all():
                return
            reason = "its frames are not finite"
        raise UserError(f"teacher {spec!r} cannot compute in fp16 ({reason}): set data.teacher_precision=fp32")


def split_layer(spec: str) -> tuple[str, int | None]:
    """Return (`name`, 4) of `name@4`; (spec, None) without a suffix, and if a folder of the whole name exists."""
    base, at, layer = spec.rpartition("@")
    if not at or local_path(spec).is_dir():
        return spec, None
    if not base or not re.fullmatch("[1-9][0-9]*", layer):
        raise UserError(f"teacher {spec!r}: a layer follows @, counted from 1, such as {base or 'NAME'}@4")
    return base, int(layer)


def check_layer(spec: str, layer: int | None, depth: int) -> None:
    if layer is not None and layer > depth:
        raise UserError(f"teacher {spec!r} has layers 1 to {depth}: choose one of them, or leave the @ out for the end")


def file_name(base: str, layer: int | None) -> str:
    """Return a teacher's name in `<key>.<name>.npy`: whisper_large_v3_l4 of `openai/whisper-large-v3` and 4."""
    last = Path(base.removeprefix("package:")).name.lower()
    name = re.sub("[^a-z0-9]+", "_", last).strip("_") or "teacher"
    return name if layer is None else f"{name}_l{layer}"


def weights_sha256(module: torch.nn.Module) -> str:
    """Return the SHA-256 over names, shapes and values. It does not depend on the format of the file."""
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
    """Yield groups of indices, sorted by length. The padded size of a group is at most `room`, unless it is one alone;
    with `equal`, all of a group have one length."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        grown = (len(group) + 1) * lengths[index] > room
        if group and (grown or (equal and lengths[index] != lengths[group[0]])):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def in_one_line(error: Exception) -> str:
    """Return at most 160 characters of an error's text. torch.load's own text on a pickle that would run code explains
    how to let it, and is replaced."""
    if isinstance(error, UnpicklingError):
        return "a pickle that is cut off or holds more than tensors"
    return " ".join(str(error).split())[:160] or type(error).__name__


def move_to(module: torch.nn.Module, device: str | torch.device, dtype: str) -> torch.dtype:
    """Move a module to a device, in fp32 or fp16. Returns the dtype that its inputs must have.

    Buffers that are not saved stay in fp32, as in from_pretrained: frequencies of rotary positions need it.
    """
    saved = module.state_dict(keep_vars=True)
    module.to(device)
    for tensor in saved.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(DTYPES[dtype])
    return DTYPES[dtype]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' tables of weights that a part of a model does not take. load_weights raises for missing
    ones."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def model_source(name: str, title: str, ways: str) -> str:
    """Return the argument of from_pretrained for a folder or a hub name. Raises UserError, which begins with `title`
    and names the `ways` to give a model, for neither."""
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{title}: {folder} has no config.json; save a transformers model there")
        return str(folder)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise cannot_load(title, "no such folder", ways)
    check_home_cache()
    return name


def cannot_load(title: str, reason: object, ways: str) -> UserError:
    """Return the error of a model that transformers does not find. ways: as in model_source."""
    first = str(reason).strip().partition("\n")[0].rstrip(".")
    return UserError(f"{title} cannot be loaded ({first}): give {ways}")


def load_weights(model_class, source: str, title: str, **options):
    """Return model_class.from_pretrained(source) in fp32 and evaluation mode. Raises UserError, which begins with
    `title`, unless the weights fill the whole model, of a Whisper's teacher the encoder.

    Reads safetensors if there are any. A pytorch_model.bin is unpickled with weights_only, which runs no code.
    """
    from safetensors import SafetensorError

    options |= {"dtype": torch.float32, "weights_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(source, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError, UnpicklingError) as error:  # cut off; shapes that do not fit config.json
        raise UserError(
            f"{title}: its weights cannot be read ({in_one_line(error)}): save or download it again"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not _MAY_LACK.fullmatch(name))
    if missing:
        raise UserError(
            f"{title}: its weights lack {missing[0]} ({len(missing)} of {model_class.__name__}'s):"
            f" save the whole model with save_pretrained"
        )
    for name in report["missing_keys"]:
        if name.endswith("masked_spec_embed"):  # a random vector in its place would give every load another hash
            torch.nn.init.zeros_(model.get_parameter(name))
    return model.eval().requires_grad_(False)
