"""The conditions of the velocity: discrete tokens stretched to mel frames, a reference prefix, and the time."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...kernels import valid_frames
from ..condition import Condition


def interpolate_tokens(
    embedded: torch.Tensor, token_lengths: torch.Tensor, lengths: torch.Tensor, frames: int
) -> torch.Tensor:
    """Return embedded (C, S, D) as (C, frames, D), each clip stretched from its tokens to its own frames.

    For every clip it is F.interpolate(mode="linear", align_corners=False) of that clip without its padding, which the
    released code applies to equally long clips. Padded frames repeat the last token. It is a product with the tokens'
    weights: the backward of a gather would add with atomics on GPUs, in embedded's dtype and in no fixed order.
    """
    ratio = (token_lengths / lengths).unsqueeze(1)
    place = (torch.arange(frames, device=embedded.device) + 0.5) * ratio - 0.5
    place = torch.minimum(place.clamp(min=0), (token_lengths - 1).unsqueeze(1)).unsqueeze(-1)
    token = torch.arange(embedded.shape[1], device=embedded.device)
    weights = (1 - (place - token).abs()).clamp(min=0)
    return torch.bmm(weights.to(embedded.dtype), embedded)


class TokenCondition(nn.Module):
    """Token ids to unit-norm frame vectors: embedding, bias-free projection (identity at first), linear interpolation,
    L2 norm.

    With `extra_vocab` (topology B; the paper interleaves t1, b1, t2, b2, … and embeds, concatenates and projects each
    pair) a second id goes with every token: [embedding | extra embedding] projected 2 dim -> dim. The projection starts
    as [identity | 0], so that the model starts as topology A and learns to use the second token; the second
    table itself starts random, since a zero one beside zero weights would never get a gradient.
    """

    def __init__(self, vocab: int, dim: int, scale: float = 1.0, extra_vocab: int | None = None):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.extra_embedding = None if extra_vocab is None else nn.Embedding(extra_vocab, dim)
        self.project = nn.Linear(dim if extra_vocab is None else 2 * dim, dim, bias=False)
        self.scale = scale
        nn.init.eye_(self.project.weight)

    def forward(self, condition: Condition, frames: int) -> torch.Tensor:
        """Return (C, frames, dim), exactly zero for clips whose tokens are dropped. Topology A ignores extra_tokens.
        Raises ValueError if topology B gets none."""
        embedded = self.embedding(condition.tokens)
        if self.extra_embedding is not None:
            if condition.extra_tokens is None:
                raise ValueError("model.extra_vocab is set, and the condition has no extra_tokens")
            embedded = torch.cat((embedded, self.extra_embedding(condition.extra_tokens)), dim=-1)
        stretched = interpolate_tokens(self.project(embedded), condition.token_lengths, condition.lengths, frames)
        normed = self.scale * F.normalize(stretched.float(), dim=-1).to(stretched.dtype)
        return keep_clips(normed, condition.keep_tokens)

    @torch.no_grad()
    def start_from(self, code_mels: torch.Tensor) -> None:
        """Write each code's mean mel (vocab, n_mels), normalised, into the first channels of its embedding."""
        self.embedding.weight[:, : code_mels.shape[1]] = code_mels.to(self.embedding.weight)


def keep_clips(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Return x (C, ...) with the clips that are not kept, keep (C,) bool, set to exact zeros."""
    return x if keep is None else torch.where(keep.view(-1, *[1] * (x.ndim - 1)), x, 0)


class TimeEmbedding(nn.Module):
    """Sinusoids of time_scale * t (cos | sin, longest period 10^4), then a two-layer SiLU MLP."""

    def __init__(self, dim: int, time_scale: float = 1.0):
        super().__init__()
        self.time_scale = time_scale
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Return the embedding (C, D) or (C, T, D) of t (C,) or (C, T) in [0, 1]."""
        embedded = sinusoids(self.time_scale * t.float(), self.dim)
        return self.mlp(embedded.to(self.mlp[0].weight.dtype))


def sinusoids(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return (..., dim): cos, then sin of values (...) at dim / 2 frequencies from 1 down to 10^-4."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=values.device) / (dim // 2))
    angles = values.unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_tables(frames: int, head_dim: int, device, theta: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin) of rotary positions, each (frames, head_dim / 2), fp32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(frames, device=device).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


def zero_padding(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return x (N, T, D) with the frames beyond lengths (C,) set to exact zeros; row n has the length of condition
    n mod C. lengths None: x itself."""
    if lengths is None:
        return x
    mask = valid_frames(lengths, x.shape[1]).unsqueeze(-1)
    return torch.where(mask, x.unflatten(0, (-1, lengths.shape[0])), 0).flatten(0, 1)
