"""CosyVoice 1 and 2's flows: classes of the package, under the names of its MaskedDiffWithXvec and
CausalMaskedDiffWithXvec (cosyvoice/flow/flow.py).

Those two classes themselves are not made: importing them takes Matcha's trainer, and their forward draws its own times
and references.
"""

import warnings
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import valid_frames
from .backbone import Layer
from .condition import Condition
from .cosyvoice import CosyVoice, stretch
from .cosyvoice_clips import AttentionOfClips, BlockOfOwnFrames, UNetOfClips, encode_and_double, encode_tokens, regulate
from .cosyvoice_package import import_part
from .f5_clips import swap

# Keywords of the package's classes, from examples/libritts/cosyvoice{,2}/conf/*.yaml.
_ENCODER = {
    "attention_heads": 8,
    "linear_units": 2048,
    "num_blocks": 6,
    "dropout_rate": 0.1,
    "positional_dropout_rate": 0.1,
    "attention_dropout_rate": 0.1,
    "normalize_before": True,
    "input_layer": "linear",
    "pos_enc_layer_type": "rel_pos_espnet",
    "selfattention_layer_type": "rel_selfattn",
    "use_cnn_module": False,
    "macaron_style": False,
}
_ESTIMATOR = {
    "dropout": 0.0,
    "attention_head_dim": 64,
    "n_blocks": 4,
    "num_mid_blocks": 12,
    "num_heads": 8,
    "act_fn": "gelu",
}


class _UNetFlow(CosyVoice):
    """The common part of both: an encoder, and a 1-D U-Net whose stages are a ResNet block and transformer blocks."""

    def __init__(self, sizes: dict[str, Any], estimator: type, n_mels: int, settings: dict, layers: str, padding: str):
        super().__init__(**sizes)
        if layers not in ("stages", "blocks"):
            raise ValueError(f"model.options.layers={layers}: stages or blocks")
        self.by_stage, self.strict = layers == "stages", padding == "strict"
        self.encoder_proj = nn.Linear(sizes["width"], n_mels)
        self.decoder = nn.Module()
        with warnings.catch_warnings():  # Matcha's FFN is of a class that diffusers will drop in its version 1
            warnings.filterwarnings("ignore", ".*LoRACompatibleLinear", FutureWarning)
            self.decoder.estimator = estimator(in_channels=4 * n_mels, out_channels=n_mels, **(_ESTIMATOR | settings))
        self.replayable = self.strict  # theirs waits for every mask
        if self.by_stage:
            self.kind, self.row_arguments = "branch", ("mask", "attention_mask")
        else:
            self.state, self.row_arguments = "hidden_states", ("attention_mask", "timestep")
        if self.strict:
            swap(self.decoder.estimator, UNetOfClips)
            for part in self.decoder.estimator.modules():
                if hasattr(part, "set_processor"):
                    part.set_processor(AttentionOfClips())

    @property
    def layers(self) -> list[Layer]:
        unet, found = self.decoder.estimator, []
        for resnet, blocks, *_ in (*unet.down_blocks, *unet.mid_blocks, *unet.up_blocks):
            width = resnet.res_conv.out_channels
            if self.by_stage:
                branches = (branch for block in blocks for branch in (block.attn1, block.ff))
                found.append(Layer((resnet.block2, *branches), width, tap=blocks[-1]))
            else:
                found += (Layer((block,), width) for block in blocks)
        return found

    def estimate(self, x_t, t, mu, speaker, reference, lengths, chunked) -> torch.Tensor:
        dtype = self.spk_embed_affine_layer.weight.dtype
        if lengths is None:
            mask = x_t.new_ones(x_t.shape[0], 1, x_t.shape[1], dtype=dtype)
        else:
            mask = valid_frames(lengths, x_t.shape[1]).unsqueeze(1).to(dtype)
        x, mu, reference = (part.to(dtype).transpose(1, 2).contiguous() for part in (x_t, mu, reference))
        streaming = False if chunked is None else chunked if self.strict else bool(chunked[0])
        return self.decoder.estimator(x, mask, mu, t, speaker.to(dtype), reference, streaming).transpose(1, 2)


class CosyVoice1(_UNetFlow):
    """Tokens are stretched to each clip's frames, whatever their rate; the U-Net halves its time once.

    n_mels, vocab, speaker_dim: of the shards. width: of token embeddings and encoder. encoder, estimator: keywords of
    the package's ConformerEncoder and ConditionalDecoder, over those of the release. layers: "stages" of the
    U-Net or their transformer "blocks". padding: "strict": it changes no clip; "upstream": the package's own.
    """

    version = "CosyVoice 1"
    upstream = "CosyVoice 1's MaskedDiffWithXvec (Apache-2.0)"

    def __init__(
        self,
        n_mels: int,
        vocab: int,
        speaker_dim: int,
        width: int = 512,
        encoder: dict[str, Any] | None = None,
        estimator: dict[str, Any] | None = None,
        layers: str = "stages",
        padding: str = "strict",
    ):
        sizes = {"n_mels": n_mels, "vocab": vocab, "speaker_dim": speaker_dim, "width": width}
        settings = {"channels": [256, 256], **(estimator or {})}
        super().__init__(sizes, import_part("flow.decoder", "ConditionalDecoder"), n_mels, settings, layers, padding)
        encoding = {"input_size": width, "output_size": width} | _ENCODER | (encoder or {})
        self.encoder = import_part("transformer.encoder", "ConformerEncoder")(**encoding)
        regulator = import_part("flow.length_regulator", "InterpolateRegulator")
        self.length_regulator = regulator(channels=n_mels, sampling_ratios=[1, 1, 1, 1])
        if self.strict:
            unet = self.decoder.estimator
            stages = (*unet.down_blocks, *unet.mid_blocks, *unet.up_blocks)
            resnets = (block for resnet, *_ in stages for block in (resnet.block1, resnet.block2))
            for block in (*resnets, unet.final_block):
                swap(block, BlockOfOwnFrames)

    def encode(self, embedded: torch.Tensor, condition: Condition, chunked: torch.Tensor | None) -> torch.Tensor:
        tokens, lengths, frames = condition.token_lengths, condition.lengths, condition.reference.shape[1]
        if self.strict:
            h = self.encoder_proj(encode_tokens(self.encoder, embedded, tokens))
            return regulate(self.length_regulator, h, tokens, lengths, frames)
        h = self.encoder_proj(self.encoder(embedded, tokens)[0])
        h = self.length_regulator(h, lengths)[0]
        return F.pad(h, (0, 0, 0, frames - h.shape[1]))


class CosyVoice2(_UNetFlow):
    """Two mel frames per token, tokens of another rate are stretched; causal convolutions and one resolution.

    n_mels, vocab, speaker_dim: of the shards. encoder, estimator: keywords of the package's UpsampleConformerEncoder
    and CausalConditionalDecoder, over those of the release. streaming: share of clips that see no later chunk in
    training. layers, padding: as in CosyVoice1.
    """

    version = "CosyVoice 2"
    upstream = "CosyVoice 2's CausalMaskedDiffWithXvec (Apache-2.0)"

    def __init__(
        self,
        n_mels: int,
        vocab: int,
        speaker_dim: int,
        encoder: dict[str, Any] | None = None,
        estimator: dict[str, Any] | None = None,
        streaming: float = 0.5,
        layers: str = "stages",
        padding: str = "strict",
    ):
        width = 512  # which the package's encoder takes for granted
        sizes = {"n_mels": n_mels, "vocab": vocab, "speaker_dim": speaker_dim, "width": width, "streaming": streaming}
        settings = {"channels": [256], "static_chunk_size": 50, "num_decoding_left_chunks": -1, **(estimator or {})}
        super().__init__(
            sizes, import_part("flow.decoder", "CausalConditionalDecoder"), n_mels, settings, layers, padding
        )
        encoding = {"input_size": width, "output_size": width, "static_chunk_size": 25} | _ENCODER | (encoder or {})
        self.encoder = import_part("transformer.upsample_encoder", "UpsampleConformerEncoder")(**encoding)

    def encode(self, embedded: torch.Tensor, condition: Condition, chunked: torch.Tensor | None) -> torch.Tensor:
        tokens = condition.token_lengths
        if self.strict:
            h = encode_and_double(self.encoder, embedded, tokens, chunked)
        else:
            h = self.encoder(embedded, tokens, streaming=chunked is not None and bool(chunked[0]))[0]
        ratio, frames = self.encoder.up_layer.stride, condition.reference.shape[1]
        return stretch(self.encoder_proj(h), tokens * ratio, condition.lengths, frames, ratio)
