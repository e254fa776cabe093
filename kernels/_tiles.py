"""Device functions of the Triton kernels on (N, T, D) tensors.

A tile (ROWS, BLOCK) holds ROWS frames of one batch row in fp32; BLOCK is D rounded up to a power of two. `d` are its
columns, `t` its frames, `n` its batch row (int64), and `mask` is False outside the tensor.
"""

from ._backend import tl, triton


@triton.jit
def span_of_program(frames, SPAN: tl.constexpr):
    """Batch row (int64) and first frame of this program, if programs share the frames in spans."""
    spans = tl.cdiv(frames, SPAN)
    return (tl.program_id(0) // spans).to(tl.int64), tl.program_id(0) % spans * SPAN


@triton.jit
def load_rows(pointer, n, t, stride_n, stride_t, d, mask):
    """A tile, zero where the mask is False."""
    offsets = n * stride_n + t.to(tl.int64)[:, None] * stride_t + d[None, :]  # int64: N*T*D overflows int32
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, tile, n, t, frames, d, mask, D: tl.constexpr):
    """Write a tile to the contiguous (N, T, D) tensor at pointer, in its dtype."""
    offsets = (n * frames + t.to(tl.int64)[:, None]) * D + d[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_modulation(pointer, c, stride_c, d, D: tl.constexpr):
    """Row c of a (C, D) modulation as a tile (1, BLOCK)."""
    return tl.load(pointer + c * stride_c + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def plane_size(frames, D: tl.constexpr, CHUNK: tl.constexpr, PER_FRAME: tl.constexpr):
    """Elements (int64) between two planes of partial sums (K, N, chunks, D), or of (K, N, T, D) if PER_FRAME."""
    programs = tl.num_programs(0).to(tl.int64)
    if PER_FRAME:
        return programs // tl.cdiv(frames, CHUNK) * frames * D
    else:
        return programs * D


@triton.jit
def store_sums(pointer, tile, d, D: tl.constexpr):
    """Write the sums of a tile's columns to this program's row of the (programs, D) tensor at pointer."""
    tl.store(pointer + tl.program_id(0).to(tl.int64) * D + d, tl.sum(tile, axis=0), mask=d < D)


@triton.jit
def row_statistics(x, inside, eps, D: tl.constexpr):
    """Mean and 1 / std of a tile's rows. `inside` (1, BLOCK) is False in columns beyond D."""
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)


@triton.jit
def load_normalised(x_ptr, mean_ptr, rstd_ptr, n, t, frames, stride_n, stride_t, d, mask):
    """A tile of normalised rows, and their 1 / std."""
    mean = tl.load(mean_ptr + n * frames + t, mask=t < frames, other=0.0)
    rstd = tl.load(rstd_ptr + n * frames + t, mask=t < frames, other=0.0)
    xhat = (load_rows(x_ptr, n, t, stride_n, stride_t, d, mask) - mean[:, None]) * rstd[:, None]
    return tl.where(mask, xhat, 0.0), rstd


@triton.jit
def norm_backward(g, xhat, rstd, D: tl.constexpr):
    """dx of rows with the normalised values xhat, given g = dy (1 + scale)."""
    along = tl.sum(g * xhat, axis=1) / D
    total = tl.sum(g, axis=1) / D
    return (g - total[:, None] - xhat * along[:, None]) * rstd[:, None]
