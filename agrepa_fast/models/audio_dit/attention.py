"""Self-attention over clips of different lengths. Which kernel computes it is chosen here and nowhere else.

| clips | kernel |
|---|---|
| of one length, on a GPU | SDPA: cuDNN, or else flash |
| of different lengths, on a GPU, in half precision | PyTorch's varlen_attn; with dropout flash-attn's, if installed |
| of different lengths, on a GPU, else | memory-efficient SDPA with a mask |
| on a CPU with bf16 instructions, in bf16 with gradients, up to 512 frames | two matrix products around a softmax |
| on a CPU, else | SDPA, with a mask if lengths differ |
| with a bias of the scores | SDPA with the bias: memory-efficient on a GPU |

cuDNN never gets a mask: the backward of version 9.19 returns NaN at some lengths (pytorch issue 196678). On CPUs, the
backward of SDPA has no products in bf16: 8 clips of 190 frames with 3 heads take 21 ms, forward and backward, on an AMD
EPYC with AVX512-BF16, and two products 7.4 (400 frames: 35 and 16). The products keep the weights of attention for the
backward, 2 T^2 bytes per clip, head and block, and round scores to bf16: RMS errors are 0.7 % instead of 0.2 to 0.3 %.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from ...kernels import valid_frames

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_TORCH_HAS_FLASH = torch.backends.cuda.is_flash_attention_available()
_BF16_PRODUCTS = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
_SHORT = 512  # frames; the weights of attention of longer clips take too much memory
_ALIGNED = 8  # channels, for which kernels load whole vectors
_NEVER = -3e4  # a score whose weight is 0 in any dtype, and which float16 can hold
_WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_WITHOUT_MASK = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_WITH_MASK]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax attention of q, k, v (N, H, T, E), as (N, T, H E).

    lengths (C,): only valid frames are attended to; row n has the length of condition n mod C. Padded frames come out
    finite and mean nothing. None: all frames are valid, and no mask is made. dropout: of the attention weights. bias
    (H, T, T): added to the scores of every clip, without a gradient. mask (N, 1, T, T) bool, instead of lengths: which
    frames each frame attends to.
    """
    if bias is not None:
        return _attend_with_bias(q, k, v, lengths, dropout, bias)
    if lengths is not None:
        if (kernel := varlen_kernel(q, dropout)) is not None:
            return _attend_segments(kernel, q, k, v, lengths)
        mask = valid_frames(lengths, q.shape[2]).repeat(q.shape[0] // lengths.shape[0], 1)[:, None, None]
    if q.is_cuda:
        with sdpa_kernel(_WITHOUT_MASK if mask is None else _WITH_MASK, set_priority=True):
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    elif _BF16_PRODUCTS and q.dtype == torch.bfloat16 and q.shape[2] <= _SHORT and torch.is_grad_enabled():
        attended = _attend_by_products(q, k, v, mask, dropout)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


def _attend_by_products(q, k, v, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def _attend_with_bias(q, k, v, lengths: torch.Tensor | None, dropout: float, bias: torch.Tensor) -> torch.Tensor:
    """Padding is masked by a further channel of queries and keys: as a part of the bias, it would need one per clip."""
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    if lengths is not None:
        valid = valid_frames(lengths, q.shape[2]).repeat(q.shape[0] // lengths.shape[0], 1).unsqueeze(1)
        q, k, v = (F.pad(x, (0, _ALIGNED)) for x in (q, k, v))
        q[..., width] = 1
        k[..., width] = torch.where(valid, 0, _NEVER)
    bias = bias.to(q.dtype).unsqueeze(0)  # SDPA on a CPU misreads one of another dtype
    with sdpa_kernel(_WITH_MASK, set_priority=True) if q.is_cuda else nullcontext():
        attended = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=scale)
    return attended[..., :width].transpose(1, 2).flatten(2)


def varlen_kernel(q: torch.Tensor, dropout: float) -> Callable[..., torch.Tensor] | None:
    """Return kernel(q, k, v, bounds_q, bounds_k, longest_q, longest_k) over packed tokens (tokens, H, E), or None if no
    such kernel takes q's device, dtype and width with this dropout."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8:
        return None
    if _TORCH_HAS_FLASH and not dropout:
        return varlen_attn
    return flash_attn_varlen_func and partial(flash_attn_varlen_func, dropout_p=dropout)


def _attend_segments(kernel: Callable, q, k, v, lengths: torch.Tensor) -> torch.Tensor:
    rows, frames = q.shape[0], q.shape[2]
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    bounds = segment_bounds(lengths, rows, frames)
    return kernel(*packed, bounds, bounds, frames, frames).flatten(1).unflatten(0, (rows, frames))


def segment_bounds(lengths: torch.Tensor, rows: int, frames: int) -> torch.Tensor:
    """Return the cumulative segment lengths (2 rows + 1,) int32 of `rows` x `frames` packed tokens.

    Each row is a segment of its valid frames and one of its padding. So nothing is gathered, and the host needs no
    length.
    """
    starts = torch.arange(0, (rows + 1) * frames, frames, dtype=torch.int32, device=lengths.device)
    bounds = starts.unsqueeze(1).expand(-1, 2).flatten()[:-1]
    bounds[1::2].unflatten(0, (-1, lengths.shape[0])).add_(lengths)  # three kernels, and once per block
    return bounds
