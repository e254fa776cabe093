"""Self-attention over clips of different lengths: flash-attn's varlen kernel where it is installed and lengths differ,
else PyTorch's SDPA, with cuDNN first on GPUs."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import valid_frames

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, dropout: float = 0.0
) -> torch.Tensor:
    """Return softmax attention of q, k, v (N, H, T, E), as (N, T, H E).

    lengths (C,): only valid frames are attended to; row n has the length of condition n mod C. Padded frames come out
    finite and mean nothing. None: all frames are valid, and no mask is made. dropout: of the attention weights.
    """
    if lengths is not None and flash_attn_varlen_func is not None and q.dtype in (torch.float16, torch.bfloat16):
        return _attend_varlen(q, k, v, lengths, dropout)
    mask = None
    if lengths is not None:
        mask = valid_frames(lengths, q.shape[2]).repeat(q.shape[0] // lengths.shape[0], 1)[:, None, None]
    if q.is_cuda:
        with sdpa_kernel(_SDPA_ORDER, set_priority=True):
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


def _attend_varlen(q, k, v, lengths: torch.Tensor, dropout: float) -> torch.Tensor:
    rows, frames = q.shape[0], q.shape[2]
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    bounds = segment_bounds(lengths, rows, frames)
    attended = flash_attn_varlen_func(*packed, bounds, bounds, frames, frames, dropout_p=dropout)
    return attended.flatten(1).unflatten(0, (rows, frames))


def segment_bounds(lengths: torch.Tensor, rows: int, frames: int) -> torch.Tensor:
    """Return the cumulative segment lengths (2 rows + 1,) int32 of `rows` x `frames` packed tokens.

    Each row is a segment of its valid frames and one of its padding. So nothing is gathered, and the host needs no
    length.
    """
    starts = torch.arange(rows, device=lengths.device) * frames
    ends = starts + lengths.repeat(rows // lengths.shape[0])
    return torch.cat((torch.stack((starts, ends), 1).flatten(), starts[-1:] + frames)).int()
