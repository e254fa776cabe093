"""Voicebox (Le et al. 2023): flow matching that fills in a span of a mel, given token ids.

By default the weights have the names and shapes of voicebox-pytorch 0.5.0's VoiceBox, and with them the same velocity.
It stands here because that package cannot be installed beside this one. Unlike there, padding never changes a clip:
tokens are stretched to each clip's own frames, and padded frames are masked throughout.

The paper's transformer (sec. 5.1, A.6) is skips=True, position="alibi", time="token", ffn="gelu", qk_norm=False,
registers=0. The paper says nothing about norms and the FFN's activation: RMS norms before attention and FFN, and GELU,
are those of ex3ndr/supervoice-voicebox (supervoice/transformer.py). There the skips join other pairs of layers.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UserError
from .audio_dit.attention import attend
from .audio_dit.conditioning import Condition, interpolate_tokens, zero_padding
from .backbone import Backbone, Layer


class Voicebox(Backbone):
    """`depth` layers of attention and an FFN with RMS norms, and register tokens in front of the frames.

    n_mels, vocab: of the shards. skips: the paper's U-Net connections from layer l to depth + 1 - l; depth must be
    even. dropout: of the FFN. position: "rotary", or "alibi" for a bias of the scores by the distance of two frames.
    time: into the "norms", or as a "token" in front of the frames. ffn: "geglu" with 2/3 of dim * ff_mult channels, or
    "gelu" with all. qk_norm: RMS norm of queries and keys, and a scale of 10. A clip without tokens gets the id
    `vocab`, as upstream; one without a reference, zeros. Raises ValueError for a choice that does not exist.
    """

    kind = "branch"
    row_arguments = ("lengths",)
    upstream = "voicebox-pytorch 0.5.0's VoiceBox (MIT)"
    upstream_suffix = ".pt"

    def __init__(
        self,
        n_mels: int,
        vocab: int,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        dim_head: int = 64,
        ff_mult: float = 4.0,
        token_dim: int = 1024,
        registers: int = 16,
        kernel_size: int = 31,
        dropout: float = 0.0,
        skips: bool = False,
        position: str = "rotary",
        time: str = "norms",
        ffn: str = "geglu",
        qk_norm: bool = True,
    ):
        super().__init__()
        choices = {"position": ("rotary", "alibi"), "time": ("norms", "token"), "ffn": ("geglu", "gelu")}
        for (name, known), value in zip(choices.items(), (position, time, ffn), strict=True):
            if value not in known:
                raise ValueError(f"{name}={value!r}: {' or '.join(known)}")
        if skips and depth % 2:
            raise ValueError(f"depth={depth}: skips join pairs of layers, so it must be even")
        self.null_id, self.condition_width = vocab, token_dim
        self.is_packages = (position, time, ffn, qk_norm, skips) == ("rotary", "norms", "geglu", True, False)
        self.sinu_pos_emb = nn.Sequential(_Fourier(dim))
        if time == "norms":
            self.sinu_pos_emb.extend((nn.Linear(dim, 4 * dim), nn.SiLU()))
        self.to_cond_emb = nn.Embedding(vocab + 1, token_dim)
        self.to_embed = nn.Linear(2 * n_mels + token_dim, dim)
        self.null_cond = nn.Parameter(torch.zeros(n_mels), requires_grad=False)
        self.conv_embed = _Conv(dim, kernel_size)
        sizes = {"heads": heads, "dim_head": dim_head, "ff_mult": ff_mult, "registers": registers}
        kinds = {"position": position, "time": time, "ffn": ffn, "qk_norm": qk_norm, "skips": skips}
        self.transformer = _Transformer(dim, depth, dropout=dropout, **sizes, **kinds)
        self.to_pred = nn.Linear(dim, n_mels, bias=False)
        self.condition_tap = nn.Identity()

    @property
    def layers(self) -> list[Layer]:
        return [_Parts(layer).layer(self.to_embed.out_features) for layer in self.transformer.layers]

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        lengths = condition.mask_lengths
        ids = condition.tokens
        if condition.keep_tokens is not None:
            ids = torch.where(condition.keep_tokens.unsqueeze(1), ids, self.null_id)
        embedded = interpolate_tokens(self.to_cond_emb(ids), condition.token_lengths, condition.lengths, x_t.shape[1])
        embedded = self.condition_tap(embedded)
        dtype = self.to_embed.weight.dtype
        x = self.to_embed(torch.cat((x_t.to(dtype), embedded.to(dtype), condition.reference.to(dtype)), dim=-1))
        x = self.conv_embed(x, lengths) + x
        return self.to_pred(self.transformer(x, self.sinu_pos_emb(t), lengths))

    def from_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take the weights of a VoiceBox, or of the ConditionalFlowMatcherWrapper around one, as its trainer saves it.
        The rest of the wrapper makes tokens and mels."""
        wrapped = {name.removeprefix("voicebox."): x for name, x in state.items() if name.startswith("voicebox.")}
        return {name: x for name, x in (wrapped or state).items() if not name.startswith("audio_enc_dec.")}

    def to_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Return the state that ConditionalFlowMatcherWrapper.load loads strictly, and its trainer saves. Raises
        UserError for a form that the package lacks."""
        if not self.is_packages:
            raise UserError(
                "voicebox-pytorch's VoiceBox has no skips, ALiBi, time token or plain FFN, nor attention without "
                "qk_norm: export without --upstream"
            )
        return {"model": {f"voicebox.{name}": tensor for name, tensor in state.items()}}


class _Parts:
    """The modules of a layer by name; upstream keeps them in a list."""

    def __init__(self, layer: nn.ModuleList):
        self.skip, _, self.norm1, self.attn, self.norm2, self.ffn, self.tap = layer

    def layer(self, width: int) -> Layer:
        return Layer((self.attn, self.ffn), width, tap=self.tap, branches={"attn": self.attn, "ffn": self.ffn})


class _Transformer(nn.Module):
    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        heads: int,
        dim_head: int,
        ff_mult: float,
        registers: int,
        dropout: float,
        skips: bool,
        position: str = "rotary",
        time: str = "norms",
        ffn: str = "geglu",
        qk_norm: bool = True,
    ):
        super().__init__()
        self.register_tokens = nn.Parameter(torch.randn(registers, dim)) if registers else None
        self.heads, self.time_token = heads, time == "token"
        self.layers = nn.ModuleList()
        self.rotary_emb = _Rotary(dim_head) if position == "rotary" else None
        for number in range(depth):
            skip = nn.Linear(2 * dim, dim) if skips and number >= depth // 2 else None
            feed = _ffn(dim, ff_mult, dropout, ffn)
            norms = (_RmsNorm(dim) if self.time_token else _AdaptiveNorm(dim, 4 * dim) for _ in range(2))
            norm1, attention, norm2 = next(norms), _Attention(dim, heads, dim_head, qk_norm), next(norms)
            self.layers.append(nn.ModuleList([skip, None, norm1, attention, norm2, feed, nn.Identity()]))
        self.final_norm = _RmsNorm(dim)

    def forward(self, x: torch.Tensor, time: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Return the states (N, T, D) after the last layer. time (N, 4 D) for the norms, or (N, D) as a token."""
        frames = x.shape[1]
        front = [] if self.register_tokens is None else [self.register_tokens.to(x.dtype).expand(len(x), -1, -1)]
        if self.time_token:
            front.append(time.to(x.dtype).unsqueeze(1))
        x = torch.cat((*front, x), dim=1)
        lead = x.shape[1] - frames
        angles = bias = None
        if self.rotary_emb is None:
            bias = _alibi(self.heads, lead, frames, x.device).to(x.dtype)
        else:
            positions = torch.arange(-lead, frames, device=x.device)
            angles = self.rotary_emb(positions.where(positions >= 0, -10_000))  # tokens in front: far from all frames
        valid = None if lengths is None else lengths + lead
        earlier = []
        for layer in self.layers:
            parts = _Parts(layer)
            if parts.skip is None:
                earlier.append(x)
            else:
                x = parts.skip(torch.cat((x, earlier.pop() * 2**-0.5), dim=-1))
            x = x + parts.attn(parts.norm1(x, time), angles, bias, valid)
            x = x + parts.ffn(parts.norm2(x, time))
            parts.tap(x[:, lead:])
        return self.final_norm(x[:, lead:])


def _alibi(heads: int, lead: int, frames: int, device: torch.device) -> torch.Tensor:
    """Return the symmetric bias (H, lead + T, lead + T): minus the distance of two frames times the head's slope (Press
    et al. 2021), and 0 from and to the tokens in front (Voicebox, A.6)."""
    slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1, device=device))
    place = torch.arange(frames, device=device)
    distance = (place.unsqueeze(1) - place).abs()
    return F.pad(-slopes[:, None, None] * distance, (lead, 0, lead, 0))


def _ffn(dim: int, mult: float, dropout: float, kind: str) -> nn.Sequential:
    if kind == "gelu":
        inner = int(dim * mult)
        return nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, dim))
    inner = int(dim * mult * 2 / 3)
    return nn.Sequential(nn.Linear(dim, 2 * inner), _GeGlu(), nn.Dropout(dropout), nn.Linear(inner, dim))


class _Attention(nn.Module):
    """Attention; with qk_norm of RMS-normed queries and keys, one gain per head and channel, and a scale of 10."""

    scale = 10.0

    def __init__(self, dim: int, heads: int, dim_head: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.q_norm, self.k_norm = (_HeadNorm(dim_head, heads) if qk_norm else None for _ in range(2))
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        y: torch.Tensor,
        angles: torch.Tensor | None,
        bias: torch.Tensor | None,
        lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        q, k, v = self.to_qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = _rotate(q, angles), _rotate(k, angles)
        if self.q_norm is not None:
            q = q * (self.scale * q.shape[-1] ** 0.5)  # attend divides by the root of the width
        return self.to_out(attend(q.to(v.dtype), k.to(v.dtype), v, lengths, bias=bias))


class _Fourier(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(dim // 2))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = 2 * math.pi * t.unsqueeze(1) * self.weights  # in t's fp32: bf16 would move them by up to 0.1
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.weights.dtype)


class _Conv(nn.Module):
    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        conv = nn.Conv1d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2)
        self.dw_conv1d = nn.Sequential(conv, nn.GELU())

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        y = self.dw_conv1d(zero_padding(x, lengths).transpose(1, 2)).transpose(1, 2)
        return zero_padding(y, lengths)


class _Rotary(nn.Module):
    def __init__(self, dim: int, theta: float = 50_000.0):
        super().__init__()
        self.register_buffer("inv_freq", theta ** (-torch.arange(0, dim, 2) / dim))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the angles (T, dim) of positions (T,)."""
        return (positions.unsqueeze(1) * self.inv_freq).repeat(1, 2)


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


class _RmsNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor, _time: torch.Tensor | None = None) -> torch.Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.gamma


class _HeadNorm(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1) * self.gamma * x.shape[-1] ** 0.5


class _AdaptiveNorm(nn.Module):
    """RMS norm whose gain and shift come from the time; the identity's at first."""

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.to_gamma, self.to_beta = nn.Linear(time_dim, dim), nn.Linear(time_dim, dim)
        for linear in (self.to_gamma, self.to_beta):
            nn.init.zeros_(linear.weight)
        nn.init.ones_(self.to_gamma.bias)
        nn.init.zeros_(self.to_beta.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        gain, shift = self.to_gamma(time).unsqueeze(1), self.to_beta(time).unsqueeze(1)
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * gain + shift


class _GeGlu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * x
