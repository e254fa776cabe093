"""Gated residual update: h' = h + m * gate * f, then the next adaLN of h', and on request the time-sum of h'.

adaLN-gated residual of Peebles & Xie 2023 (DiT), with the ablation gate m of AG-REPA's FoG-A (arXiv 2603.01006).

Dims:     N rows, C conditions (C divides N, row n has condition n mod C), T frames, D width.
Shapes:   h, f, h', y (N, T, D); gate, scale, shift (C, D) or (C, T, D); m (N,) in [0, 1]; lengths (C,); time_sum (N, D)
          fp32.
Numerics: a row with m = 0 hands h on untouched, whatever f holds; time_sum adds the valid frames in fp32.
"""

from typing import NamedTuple

import torch

from ._rows import over_time, split_rows, valid_frames
from .ada_norm import ada_norm_ref


class GatedResidual(NamedTuple):
    h: torch.Tensor  # (N, T, D)
    y: torch.Tensor | None  # (N, T, D), the modulated norm of h, when scale and shift were given
    time_sum: torch.Tensor | None  # (N, D) fp32, when it was asked for


def gated_residual_ref(
    h: torch.Tensor,
    f: torch.Tensor,
    gate: torch.Tensor,
    m: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    time_sum: bool = False,
    eps: float = 1e-6,
) -> GatedResidual:
    update = (split_rows(f, gate.shape[0]) * over_time(gate)).flatten(0, 1)
    if m is None:
        out = h + update
    else:
        rows = m.view(-1, 1, 1).to(h.dtype)
        out = torch.where(rows == 0, h, h + rows * update)
    y = None if scale is None else ada_norm_ref(out, scale, shift, eps)
    total = None
    if time_sum:
        total = out.float()
        if lengths is not None:
            mask = valid_frames(lengths, h.shape[1])[..., None]
            total = torch.where(mask, split_rows(total, lengths.shape[0]), 0).flatten(0, 1)
        total = total.sum(1)
    return GatedResidual(out, y, total)


def gated_residual(
    h: torch.Tensor,
    f: torch.Tensor,
    gate: torch.Tensor,
    m: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    time_sum: bool = False,
    eps: float = 1e-6,
) -> GatedResidual:
    """Residual update, the next modulated norm when scale and shift are given, and the masked time-sum when asked.

    Raises ValueError when shapes disagree or only one of scale and shift is given.
    """
    if h.shape != f.shape:
        raise ValueError(f"h {tuple(h.shape)} and f {tuple(f.shape)} must have the same shape")
    if m is not None and m.shape != h.shape[:1]:
        raise ValueError(f"m {tuple(m.shape)} must be one gate a row, ({h.shape[0]},)")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together: one of them is missing")
    return gated_residual_ref(h, f, gate, m, scale=scale, shift=shift, lengths=lengths, time_sum=time_sum, eps=eps)
