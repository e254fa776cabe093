"""A point on the flow-matching path and its velocity, with noise from a counter-based stream keyed by clip.

x_t = (1 - t) sigma eps + t x, target = x - sigma eps (Lipman et al. 2023; sigma as in the released AG-REPA code).
Philox4x32-10 (Salmon et al. 2011) with Triton's conventions for counters and normals, so that a kernel can draw the
same noise in place: element i of clip c is the (i mod 4)-th normal of counter i / 4 under key c, hence it depends
neither on the batch nor on the padding.

Dims:     C clips, T frames, M mel bins.
Shapes:   x, x_t, target (C, T, M); t (C,) or (C, T); keys (C,) int64.
"""

import math

import torch

_A, _B = 0xD2511F53, 0xCD9E8D57  # multipliers, and below the Weyl increments, of Salmon et al. 2011, table 2
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _philox(keys: torch.Tensor, counters: int) -> list[torch.Tensor]:
    """Four (C, counters) tensors of 32-bit words, held in int64."""
    c0 = torch.arange(counters, device=keys.device).expand(len(keys), -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = (keys & _LOW).unsqueeze(1), ((keys >> 32) & _LOW).unsqueeze(1)
    for _ in range(10):
        high, low = c2 * _B, c0 * _A  # int64 products wrap, their 64 bits are still right
        c0, c1, c2, c3 = (
            ((high >> 32) & _LOW) ^ c1 ^ k0,
            high & _LOW,
            ((low >> 32) & _LOW) ^ c3 ^ k1,
            low & _LOW,
        )
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def _uniform(words: torch.Tensor) -> torch.Tensor:
    signed = torch.where(
        words >= 1 << 31, (1 << 32) - 1 - words, words
    )  # Triton folds the sign bit instead of shifting
    return signed.float() * 4.6566127342e-10


def philox_uniform(keys: torch.Tensor, count: int) -> torch.Tensor:
    """(C, count) fp32 in [0, 1), from keys (C,) int64."""
    words = torch.stack(_philox(keys, (count + 3) // 4), dim=-1)
    return _uniform(words).flatten(1)[:, :count]


def philox_normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """(C, count) fp32 standard normals, from keys (C,) int64."""
    u = [_uniform(words) for words in _philox(keys, (count + 3) // 4)]
    pairs = []
    for first, second in (u[:2], u[2:]):
        radius = torch.sqrt(-2 * torch.log(first.clamp(min=1e-7)))
        angle = 2 * math.pi * second
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]


def flow_mix_ref(
    x: torch.Tensor, t: torch.Tensor, keys: torch.Tensor, sigma: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    noise = sigma * philox_normal(keys, x[0].numel()).view_as(x).to(x.dtype)
    t = t.to(x.dtype).view(*t.shape, *[1] * (x.ndim - t.ndim))
    return (1 - t) * noise + t * x, x - noise


def flow_mix(
    x: torch.Tensor, t: torch.Tensor, keys: torch.Tensor, sigma: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and the velocity target of clips x at times t. Raises ValueError unless there is one time and one key a
    clip."""
    if t.shape[0] != x.shape[0] or keys.shape != x.shape[:1]:
        raise ValueError(
            f"{x.shape[0]} clips need as many times and keys, not {tuple(t.shape)} and {tuple(keys.shape)}"
        )
    return flow_mix_ref(x, t, keys, sigma)
