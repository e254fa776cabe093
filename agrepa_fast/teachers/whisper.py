"""Whisper's encoder on a clip's own length: 50 frames per second, without the 30 s of padding of its training.

A 2 s clip costs a fifteenth of the padded one. The model is transformers'; the `forward` of its encoder takes 30 s
only, so the four lines that lead to the layers are repeated here. Radford et al. 2022, "Robust Speech Recognition via
Large-Scale Weak Supervision".
"""

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError
from .base import Teacher, batches_by_length, check_layer, check_waves, file_name, load_weights, move_to, weights_sha256

_SUBSAMPLING = 2  # mel frames per encoder frame: the stride of conv2
_GPU_ROOM = 6000  # encoder frames of a batch, padding included


class WhisperTeacher(Teacher):
    """Frames after the last layer and its norm, or after 1-based `layer` without a norm."""

    def __init__(self, encoder, extractor, base: str, layer: int | None, identity: dict, device="cpu", dtype="fp32"):
        config = encoder.config
        check_layer(base, layer, config.encoder_layers)
        self.name = file_name(base, layer)
        self.dim = config.d_model
        self.sample_rate = extractor.sampling_rate
        self.samples_per_frame = extractor.hop_length * _SUBSAMPLING
        self.rate = self.sample_rate / self.samples_per_frame
        self.identity = identity | {"class": "WhisperEncoder", "layer": layer, "precision": dtype}
        self.identity["sha256"] = weights_sha256(encoder)
        self._window = config.max_source_positions * self.samples_per_frame  # 30 s, as far as positions go
        self._extractor, self._layer, self._device = extractor, layer, torch.device(device)
        self._encoder, self._dtype = encoder, move_to(encoder, device, dtype)
        # On a CPU batches gain no speed (measured), and a clip alone has the same bits in every list.
        self.room = _GPU_ROOM if self._device.type == "cuda" else 1
        if dtype != "fp32":
            self.check_precision(base)

    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        return self._frames(waves, 0)

    def attention_shape(self, layers: int, seconds: float) -> tuple[int, int, int, int]:
        depth, window = self._layer or len(self._encoder.layers), self._window / self.sample_rate
        spec = self.identity["spec"]
        if layers > depth:
            raise UserError(
                f"data.teacher_attention={layers}: teacher {spec!r} runs {depth} layers: set at most {depth}"
            )
        if seconds > window:
            raise UserError(
                f"data.teacher_attention={layers}: teacher {spec!r} attends over {window:g} s, and data.max_seconds is "
                f"{seconds:g}: set data.max_seconds={window:g}"
            )
        attention = self._encoder.layers[0].self_attn
        return layers, 2, attention.num_heads, attention.head_dim

    def frames_with_attention(self, waves: list[np.ndarray], layers: int) -> list[np.ndarray]:
        return self._frames(waves, layers)

    @torch.inference_mode()
    def _frames(self, waves: list[np.ndarray], attention: int) -> list[np.ndarray]:
        check_waves(waves)
        owners, mels = [], []
        for owner, wave in enumerate(waves):
            for start in range(0, len(wave), self._window):
                owners.append(owner)
                mels.append(self._log_mel(wave[start : start + self._window]))
        lengths = [mel.shape[1] // _SUBSAMPLING for mel in mels]
        pieces: dict[int, np.ndarray] = {}
        for group in batches_by_length(lengths, self.room):
            of_group = [[values[index] for index in group] for values in (mels, lengths)]
            hidden = self._encode(*of_group, attention)
            for row, index in zip(hidden.float().cpu().numpy(), group, strict=True):
                pieces[index] = row[: lengths[index]]
        of_wave: list[list[np.ndarray]] = [[] for _ in waves]
        for index, owner in enumerate(owners):
            of_wave[owner].append(pieces[index])
        return [np.concatenate(parts) for parts in of_wave]

    def _log_mel(self, wave: np.ndarray) -> torch.Tensor:
        """Return (mels, frames) of a wave (samples,), with zeros appended up to a whole encoder frame."""
        features = self._extractor(
            wave,
            sampling_rate=self.sample_rate,
            padding="longest",
            truncation=False,
            pad_to_multiple_of=self.samples_per_frame,
            return_tensors="pt",
        )
        return features.input_features[0]

    def _encode(self, mels: list[torch.Tensor], lengths: list[int], attention: int) -> torch.Tensor:
        """Return (B, max(lengths), dim) of log-mels (mels, 2 lengths[b]), with queries and keys of `attention` last
        layers behind. Rows beyond their length hold no meaning."""
        # Zeros after the end equal the convolutions' own padding. conv1's output there is not zero, but conv2's last
        # frame reads mel frames 2 n - 3 ... 2 n - 1 of an even number 2 n, and never that output.
        longest = max(lengths)
        batch = torch.stack([F.pad(mel, (0, _SUBSAMPLING * longest - mel.shape[1])) for mel in mels])
        batch = batch.to(self._device, self._dtype)
        encoder = self._encoder
        hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(batch)))).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[:longest]
        mask = self._attention_mask(lengths, longest)
        blocks, told = encoder.layers[: self._layer], []
        for number, block in enumerate(blocks):
            if number >= len(blocks) - attention:
                y, attend = block.self_attn_layer_norm(hidden), block.self_attn
                told += [attend.q_proj(y) * attend.scaling, attend.k_proj(y)]
            hidden = block(hidden, mask)
        return torch.cat([encoder.layer_norm(hidden) if self._layer is None else hidden, *told], dim=-1)

    def _attention_mask(self, lengths: list[int], longest: int) -> torch.Tensor | None:
        """Return (B, 1, 1, longest) to add to the scores, so that no clip attends beyond its length; None for equal
        lengths."""
        if min(lengths) == longest:
            return None
        beyond = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(beyond.shape, dtype=self._dtype).masked_fill_(beyond, torch.finfo(self._dtype).min)
        return mask[:, None, None].to(self._device)


def load_whisper(
    config, base: str, source: str, layer: int | None, identity: dict, device: str = "cpu", dtype: str = "fp32"
) -> WhisperTeacher:
    """Return the teacher of a Whisper saved by transformers, the whole model or its encoder alone. source: a folder or
    a hub name."""
    from transformers import WhisperFeatureExtractor, WhisperModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    if config.architectures == ["WhisperEncoder"]:
        encoder = load_weights(WhisperEncoder, source, f"teacher {base!r}")
    else:
        encoder = load_weights(WhisperModel, source, f"teacher {base!r}").encoder
    # The extractor's arithmetic is fixed but for the number of mel bands, so a folder need not hold its settings.
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    return WhisperTeacher(encoder, extractor, base, layer, identity, device, dtype)
