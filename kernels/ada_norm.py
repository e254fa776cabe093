"""Adaptive layer norm (adaLN): y = layer_norm(x) * (1 + scale) + shift.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", sec. 3.2.

Dims:     N rows of the batch, C conditions (C divides N, row n has condition n mod C), T frames, D width.
Shapes:   x, y (N, T, D); scale, shift (C, D) or (C, T, D), any row stride.
Numerics: the norm has no learned affine; y in x's dtype.
"""

import torch
import torch.nn.functional as F

from ._rows import over_time, split_rows


def ada_norm_ref(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    normed = split_rows(F.layer_norm(x, x.shape[-1:], eps=eps), scale.shape[0])
    return (normed * (1 + over_time(scale)) + over_time(shift)).flatten(0, 1)


def ada_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Modulated layer norm of x (N, T, D). Raises ValueError when the conditions do not divide the rows or the widths
    differ."""
    if scale.shape != shift.shape or scale.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} must agree and end in {x.shape[-1]}"
        )
    return ada_norm_ref(x, scale, shift, eps)
