"""Relative change of the velocity under ablation: ||v_k - v|| / (||v|| + eps) over a clip's valid frames.

AG-REPA (arXiv 2603.01006), the FoG-A score of one clip.

Dims:     V variants, C clips, T frames, M mel bins.
Shapes:   variants (V, C, T, M); base (C, T, M); lengths (C,) or None; change (V, C) fp32.
Numerics: fp32; padded frames count for nothing, whatever they hold.
"""

import torch

from ._rows import valid_frames


def velocity_change_ref(
    variants: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor | None = None, eps: float = 1e-8
) -> torch.Tensor:
    difference = variants - base
    if lengths is not None:
        mask = valid_frames(lengths, base.shape[1])[..., None]
        difference, base = torch.where(mask, difference, 0), torch.where(mask, base, 0)
    return difference.flatten(2).norm(dim=2) / (base.flatten(1).norm(dim=1) + eps)


def velocity_change(
    variants: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor | None = None, eps: float = 1e-8
) -> torch.Tensor:
    """Change of every variant and clip (V, C), fp32. Raises ValueError when the variants are not of the base's
    shape."""
    if variants.shape[1:] != base.shape:
        raise ValueError(f"variants {tuple(variants.shape)} must be (V, *{tuple(base.shape)})")
    return velocity_change_ref(variants.float(), base.float(), lengths, eps)
