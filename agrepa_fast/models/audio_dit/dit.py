"""AudioDiT: the velocity model of AG-REPA, v(x_t, t, condition) over mel frames."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ...config import ModelConfig
from ..backbone import Backbone, Layer, Velocity
from ..condition import Condition
from .block import GatedDiTBlock
from .conditioning import TimeEmbedding, TokenCondition, keep_clips, rotary_tables, sinusoids, zero_padding


class AudioDiT(Backbone):
    """`depth` gated DiT blocks between a linear input of [x_t | tokens | reference] and a linear output.

    config: n_mels and vocab must be set (a run takes them from its shards); ValueError if not. finish: called with
    each part once it is initialised, before the next one is made, and returns the part. ZeRO-3 partitions it there, so
    that no rank ever holds the whole model.

    In training, `recompute` keeps only each block's inputs for the backward (activation checkpointing), and `run_block`
    may be set to a compiled block(x, cond, **options). Evaluation and probes call the blocks themselves.
    """

    row_arguments = ()  # the blocks' other arguments are per condition
    state = 0
    replayable = True
    tells_attention = True

    def __init__(self, config: ModelConfig, finish: Callable[[nn.Module], nn.Module] = lambda part: part):
        super().__init__()
        if config.n_mels is None or config.vocab is None:
            raise ValueError("ModelConfig.n_mels and ModelConfig.vocab are those of the shards: set both")
        self.config = config
        self.recompute = False
        self.condition_width = config.token_dim
        # 4 D for scores and values, over (8 + 4 ffn_mult) D^2 for the four projections and the two FFN layers.
        self.attention_cost = 1 / ((2 + config.ffn_mult) * config.dim)
        self.run_block = _run_block
        dim = config.dim
        self.time = finish(TimeEmbedding(dim, config.time_scale))
        self.tokens = finish(TokenCondition(config.vocab, config.token_dim, config.token_scale, config.extra_vocab))
        # One Linear of [x_t | tokens | reference], split so that the condition's part is computed once for all rows
        # that share it.
        self.in_x = finish(nn.Linear(config.n_mels, dim))
        self.in_condition = finish(nn.Linear(config.token_dim + config.n_mels, dim, bias=False))
        convolves = config.position == "rotary_conv"
        self.in_conv = finish(nn.Conv1d(dim, dim, 9, padding=4, groups=dim)) if convolves else None
        self.blocks = nn.ModuleList(finish(self._new_block(config)) for _ in range(config.depth))
        self.norm = finish(nn.LayerNorm(dim, eps=1e-6))
        self.out = finish(nn.Linear(dim, config.n_mels))

    @property
    def layers(self) -> list[Layer]:
        dim = self.config.dim
        return [Layer((b,), dim, branches={"attn": b.attn, "ffn": b.ffn}) for b in self.blocks]

    def recompute_layers(self) -> None:
        self.recompute = True

    @torch.no_grad()
    def start_from_codes(self, code_mels: torch.Tensor, gathered: Callable) -> None:
        """Write each code's mean mel (vocab, n_mels), normalised, into the first channels of its embedding."""
        if self.config.token_dim >= code_mels.shape[1]:
            with gathered([self.tokens.embedding.weight]):
                self.tokens.start_from(code_mels)

    @staticmethod
    def _new_block(config: ModelConfig) -> GatedDiTBlock:
        options = {"dropout": config.dropout, "qk_norm": config.qk_norm, "gelu": config.gelu}
        block = GatedDiTBlock(config.dim, config.heads, config.ffn_mult, **options)
        block.initialize(config.init)
        return block

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        *,
        capture: tuple[int, ...] = (),
        pooled: bool = False,
        attention: tuple[int, ...] = (),
    ) -> Velocity:
        """Return the velocity at x_t (N, T, n_mels), for times t (C,) or (C, T) and C conditions; row n has condition
        n mod C.

        capture: 1-based layers whose outputs come back in `hidden`, averaged over valid frames if pooled; 0 is the
        token condition, (C, T, token_dim) or (C, token_dim), zero where a clip's tokens are dropped. attention: layers
        whose queries and keys come back; not those that are captured as means. Raises ValueError if the conditions do
        not divide the rows, or if a layer does not exist.
        """
        self.check_inputs(x_t, t, condition, capture, attention)
        conditions, frames = condition.lengths.shape[0], x_t.shape[1]
        lengths = condition.mask_lengths
        tokens = self.tokens(condition, frames)
        x = self._embed(x_t, tokens, condition, frames)
        cond = self.time(t)
        modulations = self.joint_modulations(cond) if self._joins_modulations(cond) else [None] * len(self.blocks)
        rope = None
        if self.config.position == "rotary_conv":
            rope = rotary_tables(frames, self.config.dim // self.config.heads, x.device)

        hidden, queries_keys = {}, {}
        if 0 in capture:
            hidden[0] = self._time_mean(tokens, condition) if pooled else tokens
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True), start=1):
            options = {"modulation": modulation, "rope": rope, "lengths": lengths}
            if layer in capture and pooled:
                x, total = self._block(block, x, cond, **options, time_sum=True)
                hidden[layer] = (total.unflatten(0, (-1, conditions)) / condition.lengths.unsqueeze(1)).flatten(0, 1)
                continue
            if layer in attention:
                x, *queries_keys[layer] = self._block(block, x, cond, **options, attention=True)
            else:
                x = self._block(block, x, cond, **options)
            if layer in capture:
                hidden[layer] = x
        return Velocity(self.as_velocity(self.out(self.norm(x)), x_t, t, condition), hidden, queries_keys)

    def _block(self, block: GatedDiTBlock, x: torch.Tensor, cond: torch.Tensor, **options):
        if not (self.training and torch.is_grad_enabled()):
            return block(x, cond, **options)
        if self.recompute:
            return checkpoint(self.run_block, block, x, cond, use_reentrant=False, **options)
        return self.run_block(block, x, cond, **options)

    def _joins_modulations(self, cond: torch.Tensor) -> bool:
        """Whether joint_modulations pays: on a GPU it saves some 150 small launches a step; on a CPU it only copies
        weights. Not under ZeRO-3, where a block's weights are there only inside its forward, nor per frame."""
        return cond.is_cuda and cond.ndim == 2 and not self.partitioned

    def joint_modulations(self, cond: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The six modulations of every block, (C, 6, D) each, of cond (C, D): one GEMM for all blocks."""
        linears = [block.modulation for block in self.blocks]
        weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
        return F.linear(F.silu(cond), weight, bias).unflatten(-1, (len(linears), 6, -1)).unbind(1)

    @staticmethod
    def _time_mean(x: torch.Tensor, condition: Condition) -> torch.Tensor:
        """x (C, T, D) -> (C, D) fp32, over valid frames."""
        return zero_padding(x.float(), condition.mask_lengths).sum(1) / condition.lengths.unsqueeze(1)

    def _embed(self, x_t: torch.Tensor, tokens: torch.Tensor, condition: Condition, frames: int) -> torch.Tensor:
        dtype = self.in_x.weight.dtype
        reference = keep_clips(condition.reference, condition.keep_reference).to(dtype)
        given = self.in_condition(torch.cat((tokens, reference), dim=-1))
        x = (self.in_x(x_t.to(dtype)).unflatten(0, (-1, given.shape[0])) + given).flatten(0, 1)
        if self.in_conv is None:
            return x + sinusoids(torch.arange(frames, device=x.device).float(), x.shape[-1]).to(dtype)
        x = zero_padding(x, condition.mask_lengths)  # the convolution looks across the end of a clip
        return x + self.in_conv(x.transpose(1, 2)).transpose(1, 2)


def _run_block(block: GatedDiTBlock, x: torch.Tensor, cond: torch.Tensor, **options):
    return block(x, cond, **options)
