"""GatedDiTBlock: a pre-norm DiT block with adaLN modulation whose branches can be gated row by row."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...config import INITS
from ...kernels import ada_norm, gated_residual, linear_gelu, qk_norm_rope
from .attention import attend


class Attention(nn.Module):
    """The attention branch of a block: y (N, T, D) -> (N, T, D), before its gate and the residual sum."""

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0, qk_norm: bool = False):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(dim // heads)) if qk_norm else None

    def forward(
        self,
        y: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        lengths: torch.Tensor | None = None,
        told: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """told: return queries and keys (N, H, T, E), too, as their products are taken."""
        q, k, v = qk_norm_rope(self.qkv(y), self.heads, rope, q_weight=self.q_norm, k_weight=self.k_norm)
        out = self.out(attend(q, k, v, lengths, self.dropout if self.training else 0.0))
        return (out, q, k) if told else out


class FeedForward(nn.Module):
    """The FFN branch of a block: y (N, T, D) -> (N, T, D), before its gate and the residual sum."""

    def __init__(self, dim: int, inner: int, *, dropout: float = 0.0, gelu: str = "erf"):
        super().__init__()
        self.dropout, self.gelu = dropout, gelu
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        inner = F.dropout(linear_gelu(y, self.fc1.weight, self.fc1.bias, self.gelu), self.dropout, self.training)
        return F.dropout(self.fc2(inner), self.dropout, self.training)


class GatedDiTBlock(nn.Module):
    """Attention and FFN, each in an adaLN-modulated, gated residual branch (Peebles & Xie 2023; AG-REPA's backbone).

    h = x + m_1 * gate_1 * attention(ada_norm(x)), out = h + m_2 * gate_2 * ffn(ada_norm(h)). The six modulations come
    in the order of the released AG-REPA code: scale, shift (attention), scale, shift (FFN), gate (attention), gate
    (FFN).

    The branches are modules, attn and ffn, so that multi_gate(kind="branch") gates them apart.

    dim: width D; heads divide it. ffn_mult: FFN width / D. dropout: of attention weights and in the FFN. qk_norm:
    per-head RMS norm of queries and keys. gelu: "erf" (exact) or "tanh".
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn_mult: float = 4.0,
        *,
        dropout: float = 0.0,
        qk_norm: bool = False,
        gelu: str = "erf",
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn = Attention(dim, heads, dropout=dropout, qk_norm=qk_norm)
        self.ffn = FeedForward(dim, int(dim * ffn_mult), dropout=dropout, gelu=gelu)
        self.initialize("adaln_zero")

    def initialize(self, init: str) -> None:
        """Make the block an identity, by a value of model.init.

        "adaln_zero" zeroes the modulation (DiT). "release" zeroes both output layers and draws the modulation from
        N(0, 0.02), as the released AG-REPA code does. Raises ValueError for another value.
        """
        if init not in INITS:
            raise ValueError(f"init={init!r}: {' or '.join(INITS)}")
        nn.init.zeros_(self.modulation.bias)
        if init == "adaln_zero":
            nn.init.zeros_(self.modulation.weight)
        else:
            nn.init.normal_(self.modulation.weight, std=0.02)
            for layer in (self.attn.out, self.ffn.fc2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: torch.Tensor,
        cond: torch.Tensor | None,
        *,
        modulation: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        lengths: torch.Tensor | None = None,
        time_sum: bool = False,
        attention: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return x (N, T, D) after the block, and with time_sum also the sum of its valid frames, (N, D) fp32, or with
        attention its queries and keys (N, H, T, E).

        cond: (C, D), or (C, T, D) for per-frame time; C divides N and row n has condition n mod C. modulation: the six
        modulations (C, 6, D) or (C, T, 6, D), instead of cond. gate: m, (N,) for the whole block or (N, 2) for
        attention and FFN; rows with gate 0 return x exactly. rope: (cos, sin), each (T, D / heads / 2). lengths: (C,)
        valid frames; None: all are. Raises ValueError for a gate of another shape.
        """
        if modulation is None:
            modulation = self.modulation(F.silu(cond)).unflatten(-1, (6, -1))
        scale1, shift1, scale2, shift2, gate1, gate2 = modulation.unbind(-2)
        m1, m2 = self._row_gates(gate, x.shape[0])

        given, queries_keys = (ada_norm(x, scale1, shift1), rope, lengths), ()
        if attention:
            attended, *queries_keys = self.attn(*given, told=True)
        else:
            attended = self.attn(*given)
        h = gated_residual(x, attended, gate1, m1, scale=scale2, shift=shift2)
        out = gated_residual(h.h, self.ffn(h.y), gate2, m2, lengths=lengths, time_sum=time_sum)
        if attention:
            return out.h, *queries_keys
        return (out.h, out.time_sum) if time_sum else out.h

    @staticmethod
    def _row_gates(gate: torch.Tensor | None, rows: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if gate is None:
            return None, None
        if gate.shape not in ((rows,), (rows, 2)):
            raise ValueError(f"gate {tuple(gate.shape)} must be ({rows},), or ({rows}, 2) for attention and FFN apart")
        return (gate, gate) if gate.ndim == 1 else (gate[:, 0], gate[:, 1])
