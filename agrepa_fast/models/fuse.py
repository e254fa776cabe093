"""Fused operations inside other people's blocks: `fuse(module)` gives DiT blocks of F5-TTS and CosyVoice 3 the forward
below.

The class of a block is swapped in place. Parameters, their names, hooks and `isinstance` stay as they are. A block then
projects queries, keys and values by one product, and norms, rotation, GELU and the gated residual sums are those of
agrepa_fast.kernels. Hooks on modules inside a block (attn, ff, …) no longer run, except on its Linear layers.
"""

from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import ada_norm, gated_residual, linear_gelu, qk_norm_rope
from .audio_dit.attention import attend

_KNOWN = {"f5_tts.model.modules.DiTBlock", "cosyvoice.flow.DiT.modules.DiTBlock"}


def fuse(module: nn.Module) -> int:
    """Fuse every known block inside `module`, in place, and return how many there are.

    Known are the DiT blocks of F5-TTS and CosyVoice 3, and classes derived from them that keep their forward. A block
    that is called in a way that the fused operations lack (flash-attn's kernels, xPos) runs its own forward. Fuse
    before torch.compile.
    """
    count = 0
    for part in module.modules():
        if isinstance(part, FusedBlock):
            count += 1
        elif any(_is_known(base) and type(part).forward is base.forward for base in type(part).__mro__):
            part.__class__ = _fused(type(part))
            count += 1
    return count


class FusedBlock:
    """The forward of a fused block. Its other base is the block's own class."""

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        mask: torch.Tensor | None = None,
        rope: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        """Return x (N, T, D) after the block. t (N, D): time embedding. mask: True on valid frames (N, T), or on those
        that each frame attends to (N, 1, T, T), CosyVoice's. rope: the rotary angles (1, T, E) of x-transformers, each
        twice, and its scale."""
        form = self.attn.processor  # CosyVoice's has none of the settings: it masks, and rotates the first head
        if getattr(form, "attn_backend", "torch") != "torch" or not _is_plain(rope, self.attn):
            return super().forward(x, t, mask=mask, rope=rope)
        angles = None if rope is None else rope[0][0, -x.shape[1] :, 0::2]
        angles = None if angles is None else (angles.cos(), angles.sin())
        valid = attended = mask
        if mask is not None and mask.ndim == 4:
            valid = mask[:, 0, -1]
        elif mask is not None:
            attended = mask.sum(1) if getattr(form, "attn_mask_enabled", True) else None
        heads = getattr(form, "pe_attn_head", 1)
        return dit_block(self, x, t, attended, angles, rotary_heads=heads, valid=valid)

    def __reduce_ex__(self, protocol):
        return _empty, (type(self).__bases__[1],), self.__dict__


def dit_block(
    block: nn.Module,
    x: torch.Tensor,
    t: torch.Tensor,
    attended: torch.Tensor | None,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    rotary_heads: int | None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x (N, T, D) after a block that has the parts of F5-TTS's DiTBlock. t (N, D): time embedding.

    attended: lengths (N,) of the clips, a mask (N, 1, T, T) of the frames that each frame attends to, or None for all.
    angles: cos and sin (T, E / 2). rotary_heads: heads that are rotated; None: all. valid (N, T): frames whose
    attention is not set to zero; None: all.
    """
    x = x.contiguous()  # F5's convolution hands on a transposed view
    norm1, norm2, inner, outer = block.attn_norm, block.ff_norm, block.ff.ff[0][0], block.ff.ff[2]
    shift1, scale1, gate1, shift2, scale2, gate2 = norm1.linear(F.silu(t)).chunk(6, dim=1)
    y = ada_norm(x, scale1, shift1, norm1.norm.eps)
    y = _attend(block.attn, y, attended, angles, rotary_heads)
    if valid is not None:
        y = y.masked_fill(~valid.unsqueeze(-1), 0.0)
    h = gated_residual(x, y, gate1, scale=scale2, shift=shift2, eps=norm2.eps)
    y = block.ff.ff[1](linear_gelu(h.y, inner.weight, inner.bias, "tanh"))
    return gated_residual(h.h, outer(y), gate2).h


def _attend(attn: nn.Module, y: torch.Tensor, attended, angles, rotary_heads: int | None) -> torch.Tensor:
    parts = attn.to_q, attn.to_k, attn.to_v
    weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
    norms = {}
    if getattr(attn, "q_norm", None) is not None:
        norms = {"q_weight": attn.q_norm.weight, "k_weight": attn.k_norm.weight}
    q, k, v = qk_norm_rope(F.linear(y, weight, bias), attn.heads, angles, rotary_heads=rotary_heads, **norms)
    by_mask = attended is not None and attended.ndim == 4
    y = attend(q, k, v, None, mask=attended) if by_mask else attend(q, k, v, attended)
    return attn.to_out[1](attn.to_out[0](y))


def _is_plain(rope, attn: nn.Module) -> bool:
    """Whether the fused rotation serves: all channels of a head, the same angles for all clips, no xPos scale."""
    if rope is None:
        return True
    angles, scale = rope
    if isinstance(scale, torch.Tensor) or scale not in (None, 1.0):
        return False
    return angles.shape[0] == 1 and angles.shape[-1] == attn.inner_dim // attn.heads


def _is_known(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" in _KNOWN


@cache
def _fused(kind: type) -> type:
    return type(kind.__name__, (FusedBlock, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _empty(kind: type) -> nn.Module:
    """Return a fused block without contents, for copies and pickles to fill."""
    made = _fused(kind)
    return made.__new__(made)
