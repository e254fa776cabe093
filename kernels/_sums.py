"""Finish partial sums: gradients of modulations and biases, from fp32 sums over chunks of rows.

Dims:     K planes (gradients that are finished together), R repeats of C conditions (row n has condition n mod C),
          chunks of frames per row, D width.
Shapes:   sums (K, R C, chunks, D) fp32; result (K, C, D).
Numerics: fp32, rounded once to the result's dtype; no atomics, deterministic.
"""

import torch

from ._backend import backend_of, tl, triton
from ._launch import UNSPECIALIZED, launch
from ._rows import ceil_div

_COLUMNS, _ROWS = 64, 64  # per program and step: whole cache lines, and enough programs to fill a GPU


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _finish_sums_kernel(
    sums_ptr,  # (K, repeats, conditions, chunks, D) fp32
    result_ptr,  # (K, conditions, D)
    repeats,
    conditions,
    chunks,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    columns = tl.cdiv(D, BLOCK)
    c = (tl.program_id(0) // columns).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for repeat in range(0, repeats):
        row = ((plane * repeats + repeat) * conditions + c) * chunks
        for start in range(0, chunks, ROWS):
            chunk = start + tl.arange(0, ROWS)
            mask = (chunk < chunks)[:, None] & (d < D)[None, :]
            total += tl.load(sums_ptr + (row + chunk[:, None]) * D + d[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + (plane * conditions + c) * D + d, result, mask=d < D)


def finish_sums(sums: torch.Tensor, like: torch.Tensor, planes: int | None = None) -> torch.Tensor:
    """Return the gradient of `like`, a bias (D,) or a modulation (C, D) or (C, T, D), in its dtype: the sums over
    repeats and chunks. With `planes`, return the gradients of K such tensors, (K, *like.shape).

    sums: contiguous partial sums ([K,] N, chunks, D), or ([K,] N, T, D) per frame.
    """
    chunks, width = sums.shape[-2:]
    shape, count = like.shape if planes is None else (planes, *like.shape), planes or 1
    if not sums.numel():
        return like.new_zeros(shape)
    if like.ndim == 3:
        return sums.view(count, -1, like.numel()).sum(1).to(like.dtype).view(shape)
    conditions = like.numel() // width
    if backend_of(sums) != "triton":
        total = sums.view(count, -1, conditions, chunks, width).sum((1, 3)).to(like.dtype)
        return total if total.shape == shape else total.view(shape)
    result = like.new_empty(shape)
    block = min(_COLUMNS, max(16, 1 << (width - 1).bit_length()))
    grid = (conditions * ceil_div(width, block), count, 1)
    sizes = (sums.numel() // (count * conditions * chunks * width), conditions, chunks)
    launch(_finish_sums_kernel, grid, (sums, result), sizes, (), D=width, BLOCK=block, ROWS=_ROWS, num_warps=4)
    return result
