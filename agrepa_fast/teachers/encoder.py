"""Any audio encoder of transformers whose frames follow time: features by its own extractor, a hook on the layer.

The strides of families are measured, not listed: when a teacher is loaded, at which lengths of a noise it adds a frame,
whether those lengths are evenly spaced, and whether the frames of a clip change when it is padded beside a longer one.
If they change (by a group norm over time, a convolution that reads the padding, or without a mask), only clips of one
length form a batch.
"""

import inspect
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError
from .base import Teacher, batches_by_length, check_layer, check_waves, file_name, move_to, weights_sha256

MASKS = ("attention_mask", "input_features_mask", "padding_mask")  # encoders' names for the mask: 0 is padding
_GPU_SECONDS = 60  # of a batch, padding included
_HARMLESS = 1e-4  # change of a frame by padding beside it, in units of the frames' size
_BESIDE = 0.02  # seconds: frames that begin nearer to the recording's begin than this cover the recording


class _Reached(Exception):
    """Raised by the hook once it has the layer's output: the layers behind it are not needed."""


class EncoderTeacher(Teacher):
    """Frames as the encoder returns them, or the output of 1-based `layer` of its transformer."""

    def __init__(self, encoder, extractor, base: str, layer: int | None, identity: dict, device="cpu", dtype="fp32"):
        self.layers = transformer_layers(encoder, base)
        check_layer(base, layer, len(self.layers))
        self.name = file_name(base, layer)
        self.sample_rate = extractor.sampling_rate
        self.identity = identity | {"class": type(encoder).__name__, "layer": layer, "precision": dtype}
        self.identity["sha256"] = weights_sha256(encoder)
        # On a CPU batches gain no speed (measured), and a clip alone has the same bits in every list.
        self.room = _GPU_SECONDS * self.sample_rate if torch.device(device).type == "cuda" else 1
        self._base, self._encoder, self._extractor = base, encoder, extractor
        self._module = encoder if layer is None else self.layers[layer - 1]
        self._accepts = inspect.signature(encoder.forward).parameters
        known = inspect.signature(extractor.__call__).parameters
        options = {"sampling_rate": self.sample_rate, "return_tensors": "pt", **self._extractor_options()}
        self._options = {name: value for name, value in options.items() if name in known}
        self._dtype = move_to(encoder, device, "fp32")
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            self._measure()
        if self.start is not None:
            self.identity["start"] = self.start
        self._dtype = move_to(encoder, device, dtype)
        if dtype != "fp32":
            self.check_precision(base)

    def _extractor_options(self) -> dict:
        return {"padding": "longest", "truncation": False, "return_attention_mask": True}

    @torch.inference_mode()
    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        check_waves(waves)
        frames: list[np.ndarray] = [np.empty(0)] * len(waves)
        for group in batches_by_length([len(wave) for wave in waves], self.room, self.equal_lengths):
            hidden = self._encode([waves[index] for index in group])
            for row, index in zip(hidden, group, strict=True):
                frames[index] = row[: self.frame_count(len(waves[index]))].copy()
        return frames

    def frame_count(self, samples: int) -> int:
        return max(1, 1 + (samples - self.first) // self.step)

    def _encode(self, waves: list[np.ndarray]) -> np.ndarray:
        """Return (B, frames of the longest, dim) float32. Rows beyond a clip's frames hold no meaning."""
        batch = _padded([self._features(wave) for wave in waves], self._time_axis)
        return self._forward(batch, self._module).float().cpu().numpy()

    def _extracted(self, wave: np.ndarray, shortest: int) -> dict[str, torch.Tensor]:
        wave = np.pad(wave, (0, max(0, shortest - len(wave))))
        features = self._extractor(wave, **self._options)
        return {name: torch.as_tensor(value) for name, value in features.items() if value is not None}

    def _features(self, wave: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the extractor's features of one clip, (1, ...) each, without the part that is padding by their mask.
        Zeros fill up a wave that is too short for a frame."""
        features = self._extracted(wave, max(self.first, self.step))
        masks = [value for name, value in features.items() if name in MASKS and not value.all()]
        if masks:
            length, valid = masks[0].shape[-1], int(masks[0].sum())
            for name, value in features.items():
                for axis in [axis for axis in range(1, value.ndim) if value.shape[axis] == length][:1]:
                    features[name] = value.narrow(axis, 0, valid)
        return features

    def _forward(self, features: dict[str, torch.Tensor], module: torch.nn.Module) -> torch.Tensor:
        """Return the output (B, frames, dim) of `module`, a layer or the encoder itself."""
        mask = next((name for name in MASKS if name in self._accepts), None)
        inputs = {}
        for name, value in features.items():
            if name in ("input_values", "input_features"):
                name = next(iter(self._accepts))
            elif name in MASKS:
                name = mask
            if name in self._accepts:
                inputs[name] = value.to(self._encoder.device, self._dtype if value.is_floating_point() else None)
        if module is self._encoder:
            return self._rows(self._encoder(**inputs).last_hidden_state)
        outputs = []

        def keep(module, args, output) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        hook = module.register_forward_hook(keep)
        try:
            self._encoder(**inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        return self._rows(outputs[0])

    def _rows(self, output: torch.Tensor) -> torch.Tensor:
        """Return a module's output as (B, frames, dim)."""
        return output

    def _measure(self) -> None:
        """Set dim, rate, start, the samples up to the first frame and between frames, and whether batches may be
        padded."""
        noise = _noise(2 * self.sample_rate)
        self.first = self.step = 0
        short, long = self._features(noise[: self.sample_rate]), self._features(noise)
        self._time_axis = {name: _differing_axis(short[name], long[name]) for name in short}
        whole = self._forward(short, self._module)
        self.dim = whole.shape[-1]
        # The first layer is enough to count at, unless the rate changes on the way to the one asked for.
        early = self._forward(short, self.layers[0]).shape[1] == whole.shape[1]
        counted = self.layers[0] if early else self._module

        def count(samples: int) -> int:
            return self._forward(self._features(noise[:samples]), counted).shape[1]

        one, other = (_next_frame(count, self.sample_rate // part) for part in (2, 1))
        frames = count(one)
        step = (other - one) / (count(other) - frames)
        self.first, self.step = round(one - (frames - 1) * step), round(step)
        lengths = (self.sample_rate // 3, self.sample_rate * 5 // 3, 2 * self.sample_rate)
        if step != self.step or any(count(length) != self.frame_count(length) for length in lengths):
            raise UserError(
                f"teacher {self._base!r}: its frames are not evenly spaced in time ({count(self.sample_rate)} in 1 s, "
                f"{count(2 * self.sample_rate)} in 2 s), so they cannot be targets: choose another"
            )
        self.rate = self.sample_rate / self.step
        # Features and convolutions are symmetric: the middle of a frame is that of the shortest wave that has it.
        start = (self.first - self.step) / 2 / self.sample_rate
        self.start = start if abs(start) > _BESIDE else None
        self.equal_lengths = not self._padding_is_harmless()

    def _padding_is_harmless(self) -> bool:
        if not any(mask in self._accepts for mask in MASKS):
            return False
        clip, longer = _noise(self.sample_rate * 2 // 3), _noise(self.sample_rate)
        frames = self.frame_count(len(clip))
        alone, together = self._encode([clip])[0, :frames], self._encode([clip, longer])[0, :frames]
        return bool(np.abs(alone - together).max() <= _HARMLESS * np.sqrt(np.mean(alone**2)))


def transformer_layers(encoder: torch.nn.Module, base: str) -> torch.nn.ModuleList:
    """Return the longest list of modules of one class that attend. Raises UserError if there is none."""

    def attends(module: torch.nn.Module) -> bool:
        return any("attention" in type(part).__name__.lower() for part in module.modules())

    lists = [module for module in encoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    lists = [layers for layers in lists if len({type(layer) for layer in layers}) == 1 and attends(layers[0])]
    if not lists:
        raise UserError(f"teacher {base!r}: {type(encoder).__name__} has no list of transformer layers")
    return max(lists, key=len)


def _noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(samples).astype(np.float32) * 0.1


def _next_frame(count: Callable[[int], int], samples: int) -> int:
    """Return the smallest length above `samples` that has more frames."""
    before, low, reach = count(samples), samples, 64
    while count(samples + reach) == before:
        low, reach = samples + reach, 2 * reach
    high = samples + reach
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) == before else (low, middle)
    return high


def _differing_axis(short: torch.Tensor, long: torch.Tensor) -> int | None:
    pairs = enumerate(zip(short.shape, long.shape, strict=True))
    return next((axis for axis, (a, b) in pairs if a != b), None)


def _padded(features: list[dict[str, torch.Tensor]], time_axis: dict[str, int | None]) -> dict[str, torch.Tensor]:
    """Return clips' features, (1, ...) each, as one batch, with zeros up to the longest, in masks too."""
    batch = {}
    for name, axis in time_axis.items():
        values = [of_clip[name] for of_clip in features]
        if axis is not None:
            longest = max(value.shape[axis] for value in values)
            behind = [0, 0] * (values[0].ndim - 1 - axis)  # F.pad counts from the last axis
            values = [F.pad(value, [*behind, 0, longest - value.shape[axis]]) for value in values]
        batch[name] = torch.cat(values)
    return batch
