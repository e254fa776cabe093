"""Encoders of transformers that read the wave: wav2vec 2.0, HuBERT, WavLM, UniSpeech, data2vec-audio."""

import math

import numpy as np
import torch

from ..config import UserError
from .base import Teacher, batches_by_length, check_layer, check_waves, load_weights, slug, weights_sha256

MODEL_TYPES = ("data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")
_GPU_ROOM = 16000 * 60  # samples of a batch, padding included


class EncoderTeacher(Teacher):
    """Frames as the model returns them, or the output of 1-based `layer` of its transformer."""

    def __init__(self, model, extractor, base: str, layer: int | None, identity: dict, device="cpu") -> None:
        config = model.config
        check_layer(base, layer, config.num_hidden_layers)
        self.name = slug(base, layer)
        self.dim = config.hidden_size
        self.sample_rate = extractor.sampling_rate
        self.rate = self.sample_rate / math.prod(config.conv_stride)
        self.identity = identity | {"class": type(model).__name__, "layer": layer, "sha256": weights_sha256(model)}
        self._convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        # A group norm over time sees the padding and no mask helps: such models take clips of one length at a time.
        self._equal_lengths = config.feat_extract_norm == "group"
        self._extractor, self._layer, self._device = extractor, layer, torch.device(device)
        if layer is not None:
            del model.encoder.layers[layer:]
        self._model = model.to(self._device)
        self.room = _GPU_ROOM if self._device.type == "cuda" else 1  # as in whisper.py

    @torch.inference_mode()
    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        check_waves(waves)
        inputs = [self._input(wave) for wave in waves]
        frames: list[np.ndarray] = [np.empty(0)] * len(waves)
        for group in batches_by_length([len(values) for values in inputs], self.room, self._equal_lengths):
            hidden = self._encode([inputs[index] for index in group]).cpu().numpy()
            for row, index in zip(hidden, group, strict=True):
                frames[index] = row[: self._frame_count(len(inputs[index]))].copy()
        return frames

    def _input(self, wave: np.ndarray) -> torch.Tensor:
        """(samples,) normalised as the model wants it; one too short for a frame is filled up with zeros."""
        wave = np.pad(wave, (0, max(0, self._receptive_field - len(wave))))
        return self._extractor(wave, sampling_rate=self.sample_rate, return_tensors="pt").input_values[0]

    @property
    def _receptive_field(self) -> int:
        """Fewest samples that give a frame."""
        samples = 1
        for kernel, stride in reversed(self._convolutions):
            samples = (samples - 1) * stride + kernel
        return samples

    def _frame_count(self, samples: int) -> int:
        for kernel, stride in self._convolutions:
            samples = (samples - kernel) // stride + 1
        return samples

    def _encode(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """(B, frames of the longest, dim); rows beyond their length are meaningless."""
        values = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(self._device)
        lengths = torch.tensor([len(v) for v in inputs], device=self._device)
        padded = bool((lengths < values.shape[1]).any())
        mask = (torch.arange(values.shape[1], device=self._device) < lengths[:, None]).long() if padded else None
        outputs: list = []
        # A hook, since models differ in whether hidden_states[-1] is before or after the final norm.
        hook = self._model.encoder.layers[-1].register_forward_hook(lambda module, args, out: outputs.append(out))
        try:
            result = self._model(values, attention_mask=mask).last_hidden_state
        finally:
            hook.remove()
        if self._layer is None:
            return result
        return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def load_encoder(config, base: str, source: str, layer: int | None, identity: dict, device="cpu") -> EncoderTeacher:
    """A model of MODEL_TYPES, saved by transformers with its feature extractor. `source`: folder or hub name."""
    from transformers import AutoFeatureExtractor, AutoModel

    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"teacher {base!r} is a {config.model_type!r} model: those of type whisper, {', '.join(MODEL_TYPES)} "
            f"can be teachers"
        )
    if getattr(config, "add_adapter", False):
        raise UserError(f"teacher {base!r} ends in an adapter, which changes its frame rate: save it without one")
    model = load_weights(AutoModel, source, base)
    return EncoderTeacher(model, AutoFeatureExtractor.from_pretrained(source), base, layer, identity, device)
