"""Encoders of transformers that take a window of fixed length.

The model's own feature extractor fills a clip up to the window, as in its training. Only the frames that cover the clip
are kept. Longer clips are cut into windows, at whole frames.
"""

import numpy as np
import torch

from ..errors import UserError
from .base import batches_by_length, check_waves
from .encoder import EncoderTeacher

_FBANK_LENGTH, _FBANK_HOP = 400, 160  # samples: torchaudio's kaldi.fbank at 16 kHz


class WindowTeacher(EncoderTeacher):
    """Whisper's encoder inside Qwen2-Audio, Voxtral and Audio Flamingo 3: 30 s, and a frame per `step` begun."""

    def _extractor_options(self) -> dict:
        return {"return_attention_mask": True}

    def _measure(self) -> None:
        self._time_axis = {}
        self.first, self.step, self.window = 1, 0, self._window()
        hidden = self._encode([np.zeros(self.window, np.float32)])
        self._rows_per_window, self.dim = hidden.shape[1:]
        self._set_step()
        self.rate = self.sample_rate / self.step

    def _window(self) -> int:
        return self._extractor.n_samples

    def _set_step(self) -> None:
        self.step, rest = divmod(self.window, self._rows_per_window)
        if rest:
            raise UserError(
                f"teacher {self._base!r}: {self._rows_per_window} frames do not divide its window of {self.window} "
                f"samples, so they cannot be targets: choose another"
            )

    def _features(self, wave: np.ndarray) -> dict[str, torch.Tensor]:
        features = self._extracted(wave, self.first)
        # Qwen2-Audio and Voxtral have this argument, do not use it, and fail on it.
        features.pop("attention_mask" if "attention_mask" in self._accepts else None, None)
        self._time_axis = dict.fromkeys(features)
        return features

    @torch.inference_mode()
    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        check_waves(waves)
        pieces, owners = [], []
        for owner, wave in enumerate(waves):
            for row in range(0, self.frame_count(len(wave)), self._rows_per_window):
                pieces.append(wave[row * self.step :][: self.window])
                owners.append(owner)
        of_wave: list[list[np.ndarray]] = [[] for _ in waves]
        for group in batches_by_length([self.window] * len(pieces), self.room):  # keeps their order
            hidden = self._encode([pieces[index] for index in group])
            for row, index in zip(hidden, group, strict=True):
                of_wave[owners[index]].append(row)
        return [np.concatenate(rows)[: self.frame_count(len(wave))] for rows, wave in zip(of_wave, waves, strict=True)]


class AstTeacher(WindowTeacher):
    """Audio spectrogram transformer (Gong et al. 2021, "AST"): the mean of a time step's patches over the bands.

    Ten frames per second, those whose 16 mel frames lie in the clip. The two class tokens are left out.
    """

    def _window(self) -> int:
        return _FBANK_LENGTH + (self._extractor.max_length - 1) * _FBANK_HOP

    def _set_step(self) -> None:
        config = self._encoder.config
        self.step = config.time_stride * _FBANK_HOP
        self.first = _FBANK_LENGTH + (config.patch_size - 1) * _FBANK_HOP
        self.start = (self.first - self.step) / 2 / self.sample_rate  # the middle of a frame is that of its mel frames

    def _rows(self, output: torch.Tensor) -> torch.Tensor:
        bands, steps = self._encoder.embeddings.get_shape(self._encoder.config)
        return output[:, 2:].unflatten(1, (bands, steps)).mean(dim=1)


class ClapTeacher(WindowTeacher):
    """CLAP's HTSAT (Wu et al. 2023): the mean of the last map's two frequency rows, 3.2 frames per second.

    The extractor repeats a short clip up to 10 s. The frames of its first occurrence are kept; the last one may end
    after the clip.
    """

    start = 0.0

    def __init__(self, encoder, extractor, base: str, layer: int | None, identity: dict, device="cpu", dtype="fp32"):
        if layer is not None:
            raise UserError(
                f"teacher {base!r}: CLAP's stages fold time into the frequency axis, so only its end has frames: leave "
                f"@{layer} out"
            )
        super().__init__(encoder, extractor, base, layer, identity, device, dtype)

    def _window(self) -> int:
        return self._extractor.nb_max_samples

    def _rows(self, output: torch.Tensor) -> torch.Tensor:
        return output.mean(dim=2).transpose(1, 2)
