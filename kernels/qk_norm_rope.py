"""Queries, keys and values from the packed projection, with per-head RMS norm and rotary positions on q and k.

Rotary: Su et al. 2021 (RoFormer). Pairs are neighbours (interleaved, as in x-transformers and F5-TTS) or halves of the
head.

Dims:     N rows, T frames, H heads, E = D / H head width.
Shapes:   qkv (N, T, 3 D) packed as q | k | v; cos, sin (T, E / 2); q_weight, k_weight (E,); q, k, v (N, H, T, E).
"""

import torch
import torch.nn.functional as F


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    heads: int,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    interleaved: bool = True,
    rotary_heads: int | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if q_weight is not None:
        q, k = F.rms_norm(q, q.shape[-1:], q_weight, eps), F.rms_norm(k, k.shape[-1:], k_weight, eps)
    if rope is not None:
        cos, sin = (table.to(q.dtype) for table in rope)
        n = heads if rotary_heads is None else rotary_heads
        q = torch.cat((_rotate(q[:, :n], cos, sin, interleaved), q[:, n:]), dim=1)
        k = torch.cat((_rotate(k[:, :n], cos, sin, interleaved), k[:, n:]), dim=1)
    return q, k, v


def qk_norm_rope(
    qkv: torch.Tensor,
    heads: int,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    interleaved: bool = True,
    rotary_heads: int | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (N, H, T, E) from qkv (N, T, 3 D). `rope` is (cos, sin); None leaves positions out; weights None leave
    the norm out.

    Raises ValueError when the heads do not divide the width or the tables do not fit.
    """
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f"qkv is {qkv.shape[-1]} wide: not three times a multiple of {heads} heads")
    width = qkv.shape[-1] // (3 * heads)
    if rope is not None and rope[0].shape != (qkv.shape[1], width // 2):
        raise ValueError(f"rotary tables are {tuple(rope[0].shape)}, wanted ({qkv.shape[1]}, {width // 2})")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together: one of them is missing")
    return qk_norm_rope_ref(
        qkv,
        heads,
        rope,
        q_weight=q_weight,
        k_weight=k_weight,
        interleaved=interleaved,
        rotary_heads=rotary_heads,
        eps=eps,
    )
