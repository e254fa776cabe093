"""BEATs (Chen et al. 2022, "BEATs: Audio Pre-Training with Acoustic Tokenizers") through speechbrain's implementation.

A recording at 16 kHz becomes a 128-band filter bank of 100 frames per second, cut into patches of 16 bands x 16 frames:
eight patches per time step. A frame of the teacher is the mean of a step's patches, 6.25 per second. A step that the
recording does not fill is left out, as in BEATs itself.

speechbrain's class reads its checkpoint by torch.load's defaults. Here the file is read with weights_only, its settings
are checked, and its weights must be exactly those of the encoder.
"""

from pathlib import Path

import numpy as np
import torch

from ..audio.waves import import_torchaudio
from ..errors import UserError
from ..files import local_path
from .base import Teacher, batches_by_length, check_layer, check_waves, file_name, in_one_line, move_to, weights_sha256

_BANDS, _WINDOW, _HOP = 128, 400, 160  # of the filter bank: mel bands, samples, samples
_GPU_SECONDS = 120  # of a batch, padding included


class BeatsTeacher(Teacher):
    """Frames of the last layer, or of 1-based `layer`."""

    sample_rate = 16000

    def __init__(self, model, spec: str, base: str, layer: int | None, device="cpu", dtype="fp32"):
        layers = model.encoder.layers
        check_layer(base, layer, len(layers))
        self.name = file_name(Path(base.removeprefix("beats:")).stem, layer)
        self.dim = model.cfg.encoder_embed_dim
        self._patch = model.cfg.input_patch_size
        self.rate = self.sample_rate / (_HOP * self._patch)
        self.start = (_WINDOW - _HOP) / 2 / self.sample_rate
        self.identity = {"spec": spec, "class": "BEATs", "layer": layer, "precision": dtype, "start": self.start}
        self.identity["sha256"] = weights_sha256(model)
        del layers[layer or len(layers) :]
        self._model, self._device, self._dtype = model, torch.device(device), move_to(model, device, dtype)
        self.room = _GPU_SECONDS * 100 if self._device.type == "cuda" else 1  # filter-bank frames; as in whisper.py
        if dtype != "fp32":
            self.check_precision(base)

    @torch.inference_mode()
    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        check_waves(waves)
        banks = [self._filter_bank(wave) for wave in waves]
        frames: list[np.ndarray] = [np.empty(0)] * len(waves)
        for group in batches_by_length([len(bank) for bank in banks], self.room):
            hidden = self._encode([banks[index] for index in group]).cpu().numpy()
            for row, index in zip(hidden, group, strict=True):
                frames[index] = row[: len(banks[index]) // self._patch].copy()
        return frames

    def _filter_bank(self, wave: np.ndarray) -> torch.Tensor:
        """Return (frames, 128) of a wave (samples,), in whole patches. Zeros fill up a wave too short for one."""
        shortest = _WINDOW + (self._patch - 1) * _HOP
        wave = np.pad(wave, (0, max(0, shortest - len(wave))))
        bank = self._model.preprocess(torch.from_numpy(wave)[None])[0]
        return bank[: len(bank) // self._patch * self._patch]

    def _encode(self, banks: list[torch.Tensor]) -> torch.Tensor:
        """Return (B, steps of the longest, dim) float32. Steps beyond a clip's own hold no meaning."""
        model, bands = self._model, _BANDS // self._patch
        padded = torch.nn.utils.rnn.pad_sequence(banks, batch_first=True)
        patches = model.patch_embedding(padded[:, None].to(self._device, self._dtype))  # (B, width, steps, bands)
        x = model.layer_norm(patches.flatten(2).transpose(1, 2))
        if model.post_extract_proj is not None:
            x = model.post_extract_proj(x)
        steps = torch.tensor([len(bank) // self._patch for bank in banks])
        beyond = (torch.arange(patches.shape[2]) >= steps[:, None]).repeat_interleave(bands, dim=1)
        hidden, _ = model.encoder(x, padding_mask=beyond.to(self._device) if beyond.any() else None)
        return hidden.float().unflatten(1, (-1, bands)).mean(dim=2)


def load_beats(spec: str, base: str, layer: int | None, device: str = "cpu", dtype: str = "fp32") -> BeatsTeacher:
    """Return the teacher of beats:FILE, a checkpoint as microsoft/unilm publishes them: {"cfg": settings, "model":
    weights}."""
    file = local_path(base.removeprefix("beats:"))
    if not file.is_file():
        raise UserError(f"teacher {spec!r}: no file {file}: give beats:FILE.pt, a checkpoint of microsoft/unilm")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        settings, weights = content["cfg"], content["model"]
        weights = {name: value.float() for name, value in weights.items() if not name.startswith("predictor.")}
    except Exception as error:  # torch.load raises nearly anything for bytes that are no checkpoint
        raise UserError(
            f"teacher {spec!r}: {file} cannot be read as tensors ({in_one_line(error)}): it must hold 'cfg' and 'model'"
        ) from error
    return BeatsTeacher(_model(spec, settings, weights), spec, base, layer, device, dtype)


def _model(spec: str, settings: object, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    import_torchaudio()
    try:
        from speechbrain.lobes.models.beats import BEATs, BEATsConfig, TransformerEncoder
    except ImportError as error:
        raise UserError(f"teacher {spec!r} needs speechbrain: pip install speechbrain ({error})") from error

    class Encoder(BEATs):
        """BEATs with the given settings. Its own constructor takes them from a file only."""

        def __init__(self, config: BEATsConfig):
            torch.nn.Module.__init__(self)
            self.cfg, patch, width = config, config.input_patch_size, config.encoder_embed_dim
            self.patch_embedding = torch.nn.Conv2d(1, config.embed_dim, patch, patch, bias=config.conv_bias)
            self.layer_norm = torch.nn.LayerNorm(config.embed_dim)
            same = config.embed_dim == width
            self.post_extract_proj = None if same else torch.nn.Linear(config.embed_dim, width)
            self.encoder = TransformerEncoder(config)

    try:
        model = Encoder(_config(BEATsConfig(), settings, weights))
        model.load_state_dict(weights)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"teacher {spec!r}: its settings do not fit its weights ({in_one_line(error)}): get it anew"
        ) from error
    return model.eval().requires_grad_(False)


def _config(config, settings: object, weights: dict[str, torch.Tensor]):
    """Return `config`, a BEATsConfig, with those of the checkpoint's settings that it has. Raises ValueError for a
    setting of another type, and for sizes that the weights do not have, before anything of that size is made."""
    if not isinstance(settings, dict):
        raise ValueError("'cfg' is no dictionary")
    for name, default in vars(config).items():
        value = settings.get(name, default)
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise ValueError(f"cfg[{name!r}] is {value!r}")
        setattr(config, name, value)
    width, patch, last = config.encoder_embed_dim, config.input_patch_size, config.encoder_layers - 1
    sizes = {
        "patch_embedding.weight": (config.embed_dim, 1, patch, patch),
        f"encoder.layers.{last}.fc1.weight": (config.encoder_ffn_embed_dim, width),
        "encoder.pos_conv.0.weight_v": (width, width // max(1, config.conv_pos_groups), config.conv_pos),
    }
    if config.relative_position_embedding:
        bias = "encoder.layers.0.self_attn.relative_attention_bias.weight"
        sizes[bias] = (config.num_buckets, config.encoder_attention_heads)
    for name, wanted in sizes.items():
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != wanted:
            raise ValueError(f"{name} is {found}, cfg says {wanted}")
    if _BANDS % patch:
        raise ValueError(f"cfg['input_patch_size'] is {patch}, which does not divide {_BANDS} bands")
    return config
