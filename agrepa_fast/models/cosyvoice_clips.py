"""CosyVoice's encoders, length regulator and U-Nets, clip by clip: no clip sees padding, and nothing waits for the GPU.

Weights and results of a clip alone are the package's. Its own forwards take norms over padded frames, stretch all clips
to the longest, look ahead into padding, and ask the device for every mask.
"""

import torch
import torch.nn as nn

from ..kernels import valid_frames
from .audio_dit.attention import attend
from .audio_dit.conditioning import interpolate_tokens, zero_padding


def attention_mask(lengths: torch.Tensor, frames: int, chunked: torch.Tensor | None, chunk: int) -> torch.Tensor:
    """Return the frames that each frame attends to, bool (C, 1, frames), or (C, frames, frames) if some clips are
    `chunked` (C,): their frames see no chunk after their own (cosyvoice/utils/mask.py, subsequent_chunk_mask)."""
    valid = valid_frames(lengths, frames).unsqueeze(1)
    if chunked is None:
        return valid
    place = torch.arange(frames, device=lengths.device)
    seen = place < ((place // chunk + 1) * chunk).unsqueeze(1)
    return valid & (seen | ~chunked[:, None, None])


def encode_tokens(encoder: nn.Module, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return (C, S, width) of token embeddings x (C, S, width): transformer/encoder.py's ConformerEncoder."""
    mask = valid_frames(lengths, x.shape[1]).unsqueeze(1)
    x, places, _ = encoder.embed(x, mask)
    return encoder.after_norm(encoder.forward_layers(x, mask, places, mask))


def encode_and_double(
    encoder: nn.Module, x: torch.Tensor, lengths: torch.Tensor, chunked: torch.Tensor | None
) -> torch.Tensor:
    """Return (C, 2 S, width) of token embeddings x (C, S, width): upsample_encoder.py's UpsampleConformerEncoder."""
    mask = attention_mask(lengths, x.shape[1], chunked, encoder.static_chunk_size)
    x, places, _ = encoder.embed(x, mask)
    x = encoder.pre_lookahead_layer(zero_padding(x, lengths))
    x = encoder.forward_layers(x, mask, places, mask)
    x, lengths = encoder.up_layer(x.transpose(1, 2), lengths)
    x = x.transpose(1, 2)
    mask = attention_mask(lengths, x.shape[1], chunked, encoder.static_chunk_size * encoder.up_layer.stride)
    x, places, _ = encoder.up_embed(x, mask)
    return encoder.after_norm(encoder.forward_up_layers(x, mask, places, mask))


def regulate(regulator: nn.Module, x: torch.Tensor, given: torch.Tensor, lengths: torch.Tensor, frames: int):
    """Return (C, frames, D), each clip of x (C, S, D) stretched from its `given` rows to its own frames (C,), through
    the convolutions of length_regulator.py's InterpolateRegulator."""
    mask = valid_frames(lengths, frames).unsqueeze(1).to(x.dtype)
    x = interpolate_tokens(x, given, lengths, frames).transpose(1, 2)
    for part in regulator.model:
        x = group_norm(part, x, mask) if isinstance(part, nn.GroupNorm) else part(x * mask)
    return x.transpose(1, 2)


def group_norm(norm: nn.GroupNorm, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return x (N, C, T) normed over groups of channels and each clip's own frames; mask (N, 1, T), 1 on those."""
    groups, mask = x.float().unflatten(1, (norm.num_groups, -1)), mask.float().unsqueeze(1)
    count = mask.sum((2, 3), keepdim=True) * groups.shape[2]
    mean = (groups * mask).sum((2, 3), keepdim=True) / count
    variance = ((groups - mean) * mask).square().sum((2, 3), keepdim=True) / count
    normed = ((groups - mean) * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
    return (normed * norm.weight.unsqueeze(1) + norm.bias.unsqueeze(1)).to(x.dtype)


class BlockOfOwnFrames:
    """Matcha's Block1D: a convolution, a norm over groups, and Mish."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return (N, C', T) of x (N, C, T); mask (N, 1, T)."""
        conv, norm, activation = self.block
        return activation(group_norm(norm, conv(x * mask), mask)) * mask


class AttentionOfClips:
    """A processor for diffusers' Attention that computes by `attend`: theirs would mask all pairs of frames, and might
    take a kernel whose backward is wrong."""

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **_none
    ) -> torch.Tensor:
        """Return (N, T, D) of hidden_states (N, T, D). attention_mask: lengths (N,), or a mask (N, 1, T, T)."""
        q, k, v = (
            part(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attention_mask.ndim == 1:
            attended = attend(q, k, v, attention_mask)
        else:
            attended = attend(q, k, v, None, mask=attention_mask)
        return attn.to_out[1](attn.to_out[0](attended))


class UNetOfClips:
    """flow/decoder.py's ConditionalDecoder and CausalConditionalDecoder; `streaming` may be a tensor (N,) bool."""

    def forward(self, x, mask, mu, t, spks=None, cond=None, streaming: bool | torch.Tensor = False) -> torch.Tensor:
        """Return the velocity (N, M, T) at x (N, M, T) and times t (N,), for mask (N, 1, T), mu and cond (N, M, T) and
        spks (N, M)."""
        if isinstance(streaming, bool):
            streaming = t.new_ones(len(t), dtype=torch.bool) if streaming else None
        time = self.time_mlp(self.time_embeddings(t).to(x.dtype))
        x = torch.cat((x, mu, spks.unsqueeze(2).expand(-1, -1, x.shape[2]), cond), dim=1)
        masks, skips = [mask], []
        for resnet, blocks, down in self.down_blocks:
            x = self._stage(x, masks[-1], time, resnet, blocks, streaming)
            skips.append(x)
            x = down(x * masks[-1])
            masks.append(masks[-1][:, :, ::2])
        masks.pop()
        for resnet, blocks in self.mid_blocks:
            x = self._stage(x, masks[-1], time, resnet, blocks, streaming)
        for resnet, blocks, up in self.up_blocks:
            here, skip = masks.pop(), skips.pop()
            x = torch.cat((x[:, :, : skip.shape[2]], skip), dim=1)
            x = up(self._stage(x, here, time, resnet, blocks, streaming) * here)
        return self.final_proj(self.final_block(x, mask) * mask) * mask

    def _stage(self, x, mask, time, resnet, blocks, streaming) -> torch.Tensor:
        x = resnet(x, mask, time).transpose(1, 2).contiguous()
        attended = (mask > 0).sum((1, 2))  # no sum of the mask: bf16 counts to 256
        if streaming is not None:
            attended = attention_mask(attended, x.shape[1], streaming, self.static_chunk_size).unsqueeze(1)
        for block in blocks:
            x = block(hidden_states=x, attention_mask=attended, timestep=time)
        return x.transpose(1, 2).contiguous()
