"""CosyVoice 3's flow: tokens with a look-ahead, and a DiT. It stands here because no package has it.

Names, shapes and numbers are those of CausalMaskedDiffWithDiT, PreLookaheadLayer and DiT in FunAudioLLM/CosyVoice at
ace7c47. Blocks run the fused operations.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import ada_norm
from .backbone import Layer
from .condition import Condition
from .cosyvoice import CosyVoice, stretch
from .cosyvoice_clips import attention_mask
from .fuse import dit_block


class CosyVoice3(CosyVoice):
    """`depth` DiT blocks over the noisy mel, the reference, the tokens and the speaker.

    n_mels, vocab, speaker_dim: of the shards. ratio: mel frames per token; tokens of another rate are stretched.
    look_ahead: tokens that are seen ahead, and look_ahead_dim the channels of that convolution. chunk: frames of a
    chunk of streaming clips. padding: no matter which, as theirs changes no clip either.
    """

    row_arguments = ("time", "attended")
    state = "x"
    upstream = "CosyVoice 3's CausalMaskedDiffWithDiT (Apache-2.0)"
    version = "CosyVoice 3"
    replayable = True
    neutral_options = CosyVoice.neutral_options | {"chunk"}  # of clips that stream, which is a matter of training

    def __init__(
        self,
        n_mels: int,
        vocab: int,
        speaker_dim: int,
        dim: int = 1024,
        depth: int = 22,
        heads: int = 16,
        dim_head: int = 64,
        ff_mult: float = 2.0,
        dropout: float = 0.1,
        look_ahead: int = 3,
        look_ahead_dim: int = 1024,
        ratio: int = 2,
        chunk: int = 50,
        streaming: float = 0.5,
        padding: str = "strict",
    ):
        super().__init__(n_mels, vocab, speaker_dim, n_mels, streaming)
        self.ratio, self.chunk = ratio, chunk
        self.pre_lookahead_layer = _LookAhead(n_mels, look_ahead_dim, look_ahead)
        self.decoder = nn.Module()
        self.decoder.estimator = _DiT(n_mels, dim, depth, heads, dim_head, ff_mult, dropout)

    @property
    def layers(self) -> list[Layer]:
        dit = self.decoder.estimator
        return [Layer((block,), dit.proj_out.in_features) for block in dit.transformer_blocks]

    def encode(self, embedded: torch.Tensor, condition: Condition, chunked: torch.Tensor | None) -> torch.Tensor:
        h = self.pre_lookahead_layer(embedded).repeat_interleave(self.ratio, dim=1)
        given = self.ratio * condition.token_lengths
        return stretch(h, given, condition.lengths, condition.reference.shape[1], self.ratio)

    def estimate(self, x_t, t, mu, speaker, reference, lengths, chunked) -> torch.Tensor:
        attended = lengths
        if chunked is not None:
            rows, frames = x_t.shape[:2]
            attended = x_t.new_full((rows,), frames, dtype=torch.int64) if lengths is None else lengths
            attended = attention_mask(attended, frames, chunked, self.chunk).unsqueeze(1)
        return self.decoder.estimator(x_t, t, mu, speaker, reference, attended)


class _LookAhead(nn.Module):
    def __init__(self, dim: int, inner: int, ahead: int):
        super().__init__()
        self.conv1 = nn.Conv1d(dim, inner, ahead + 1)
        self.conv2 = nn.Conv1d(inner, dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (C, S, D), zero in the padding, plus the contribution of the next tokens."""
        y = F.pad(x.transpose(1, 2), (0, self.conv1.kernel_size[0] - 1))
        y = F.pad(F.leaky_relu(self.conv1(y)), (self.conv2.kernel_size[0] - 1, 0))
        return x + self.conv2(y).transpose(1, 2)


class _DiT(nn.Module):
    def __init__(self, n_mels: int, dim: int, depth: int, heads: int, dim_head: int, ff_mult: float, dropout: float):
        super().__init__()
        self.time_embed, self.input_embed, self.rotary_embed = _Time(dim), _Input(4 * n_mels, dim), _Rotary(dim_head)
        self.transformer_blocks = nn.ModuleList(_Block(dim, heads, dim_head, ff_mult, dropout) for _ in range(depth))
        self.norm_out = _Modulated(dim, 2)
        self.proj_out = nn.Linear(dim, n_mels)

    def forward(self, x, t, mu, speaker, reference, attended: torch.Tensor | None) -> torch.Tensor:
        """Return the velocity (N, T, n_mels). attended: lengths (N,), a mask (N, 1, T, T), or None for all frames."""
        dtype = self.proj_out.weight.dtype
        given = (x, reference, mu, speaker.unsqueeze(1).expand(-1, x.shape[1], -1))
        x = self.input_embed(torch.cat([part.to(dtype) for part in given], dim=-1))
        time, angles = self.time_embed(t), self.rotary_embed(x.shape[1])
        for block in self.transformer_blocks:
            x = block(x, time, attended, angles)
        scale, shift = self.norm_out.linear(F.silu(time)).chunk(2, dim=1)
        return self.proj_out(ada_norm(x, scale, shift, self.norm_out.norm.eps))


class _Time(nn.Module):
    def __init__(self, dim: int, channels: int = 256):
        super().__init__()
        self.channels = channels
        self.time_mlp = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Return the embedding (N, D) of times t (N,). Sinusoids are fp32: 1000 t is more than bf16 tells apart."""
        half = self.channels // 2
        frequencies = 10_000.0 ** (-torch.arange(half, device=t.device) / (half - 1))
        angles = 1000 * t.float().unsqueeze(1) * frequencies
        return self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.time_mlp[0].weight.dtype))


class _Input(nn.Module):
    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(channels, dim)
        self.conv_pos_embed = _CausalConvs(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        return self.conv_pos_embed(x) + x


class _CausalConvs(nn.Module):
    def __init__(self, dim: int, kernel_size: int = 31, groups: int = 16):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Sequential(nn.Conv1d(dim, dim, kernel_size, groups=groups), nn.Mish()) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            y = conv(F.pad(y, (conv[0].kernel_size[0] - 1, 0)))
        return y.transpose(1, 2)


class _Rotary(nn.Module):
    def __init__(self, dim_head: int, theta: float = 10_000.0):
        super().__init__()
        self.register_buffer("inv_freq", theta ** (-torch.arange(0, dim_head, 2) / dim_head))

    def forward(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (T, E / 2)."""
        angles = torch.arange(frames, device=self.inv_freq.device).unsqueeze(1) * self.inv_freq
        return angles.cos(), angles.sin()


class _Modulated(nn.Module):
    """A norm without learned affine, and the projection of the time to its modulations."""

    def __init__(self, dim: int, modulations: int):
        super().__init__()
        self.linear = nn.Linear(dim, modulations * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class _Attention(nn.Module):
    q_norm = None

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * dim_head) for _ in range(3))
        self.to_out = nn.ModuleList((nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)))


class _FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int, dropout: float):
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, inner), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, dim))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: float, dropout: float):
        super().__init__()
        self.attn_norm, self.attn = _Modulated(dim, 6), _Attention(dim, heads, dim_head, dropout)
        self.ff_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = _FeedForward(dim, int(dim * ff_mult), dropout)

    def forward(self, x: torch.Tensor, time: torch.Tensor, attended: torch.Tensor | None, angles) -> torch.Tensor:
        return dit_block(self, x, time, attended, angles, rotary_heads=1)
