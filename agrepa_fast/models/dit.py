"""AudioDiT: the velocity model of AG-REPA, v(x_t, t, condition) over mel frames."""

from typing import NamedTuple

import torch
import torch.nn as nn

from ..config import ModelConfig
from .block import GatedDiTBlock
from .conditioning import Condition, TimeEmbedding, TokenCondition, keep_clips, rotary_tables, sinusoids, zero_padding


class Velocity(NamedTuple):
    v: torch.Tensor  # (N, T, n_mels), zero in the padding
    hidden: dict[int, torch.Tensor]  # 1-based layer -> block output (N, T, D), or its masked time-mean (N, D)


class AudioDiT(nn.Module):
    """`depth` gated DiT blocks between a linear input of [x_t | tokens | reference] and a linear output.

    Sizes and options: ModelConfig, whose n_mels and vocab must be set (a run takes them from its shards). Raises
    ValueError if not.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.n_mels is None or config.vocab is None:
            raise ValueError("ModelConfig.n_mels and ModelConfig.vocab are those of the shards: set both")
        self.config = config
        dim = config.dim
        self.time = TimeEmbedding(dim, config.time_scale)
        self.tokens = TokenCondition(config.vocab, config.token_dim, config.token_scale)
        # One Linear of [x_t | tokens | reference], split so that the condition's part is computed once for all rows
        # that share it.
        self.in_x = nn.Linear(config.n_mels, dim)
        self.in_condition = nn.Linear(config.token_dim + config.n_mels, dim, bias=False)
        self.in_conv = nn.Conv1d(dim, dim, 9, padding=4, groups=dim) if config.position == "rotary_conv" else None
        self.blocks = nn.ModuleList(
            GatedDiTBlock(
                dim, config.heads, config.ffn_mult, dropout=config.dropout, qk_norm=config.qk_norm, gelu=config.gelu
            )
            for _ in range(config.depth)
        )
        for block in self.blocks:
            block.initialize(config.init)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, config.n_mels)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        *,
        capture: tuple[int, ...] = (),
        pooled: bool = False,
    ) -> Velocity:
        """Velocity at x_t (N, T, n_mels), for times t (C,) or (C, T) and C conditions; row n has condition n mod C.

        capture: 1-based layers whose outputs come back in `hidden`, time-averaged over valid frames when pooled.
        Raises ValueError when the conditions do not divide the rows or a captured layer does not exist.
        """
        conditions, frames = condition.lengths.shape[0], x_t.shape[1]
        if x_t.shape[0] % conditions or t.shape[0] != conditions:
            raise ValueError(
                f"{x_t.shape[0]} rows and {t.shape[0]} times over {conditions} conditions: C times, C divides rows"
            )
        if outside := [layer for layer in capture if not 1 <= layer <= len(self.blocks)]:
            raise ValueError(f"capture={outside}: layers are numbered 1 to {len(self.blocks)}")
        x = self._embed(x_t, condition, frames)
        cond = self.time(t)
        rope = None
        if self.config.position == "rotary_conv":
            rope = rotary_tables(frames, self.config.dim // self.config.heads, x.device)

        hidden = {}
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x, cond, rope=rope, lengths=condition.lengths)
            if layer in capture:
                hidden[layer] = time_mean(x, condition.lengths) if pooled else x
        return Velocity(zero_padding(self.out(self.norm(x)), condition.lengths), hidden)

    def _embed(self, x_t: torch.Tensor, condition: Condition, frames: int) -> torch.Tensor:
        dtype = self.in_x.weight.dtype
        reference = keep_clips(condition.reference, condition.keep_reference).to(dtype)
        given = self.in_condition(torch.cat((self.tokens(condition, frames), reference), dim=-1))
        x = (self.in_x(x_t.to(dtype)).unflatten(0, (-1, given.shape[0])) + given).flatten(0, 1)
        if self.in_conv is None:
            return x + sinusoids(torch.arange(frames, device=x.device).float(), x.shape[-1]).to(dtype)
        x = zero_padding(x, condition.lengths)  # the convolution looks across the end of a clip
        return x + self.in_conv(x.transpose(1, 2)).transpose(1, 2)


def time_mean(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of x (N, T, D) over the valid frames of each row, (N, D) fp32; row n has the length of condition n mod C."""
    total = zero_padding(x.float(), lengths).sum(1).unflatten(0, (-1, lengths.shape[0]))
    return (total / lengths.unsqueeze(1)).flatten(0, 1)
