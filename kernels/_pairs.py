"""Device functions of qk_norm_rope: heads as pairs, of neighbours (INTERLEAVED) or of elements of both halves."""

from ._backend import tl, triton


@triton.jit
def load_pairs(pointer, offsets, rows, E: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second members of all pairs of some heads, as fp32 tiles (ROWS, BLOCK / 2).

    offsets (ROWS, 1) are the starts of the heads; rows (ROWS, 1) is False beyond the last head."""
    if INTERLEAVED:  # one wide load, split in registers
        e = tl.arange(0, BLOCK)[None, :]
        x = tl.load(pointer + offsets + e, mask=rows & (e < E), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK // 2, 2)))
    else:
        e = tl.arange(0, BLOCK // 2)[None, :]
        half: tl.constexpr = (E + 1) // 2  # an odd E has a norm, but no rotation
        a = tl.load(pointer + offsets + e, mask=rows & (e < half), other=0.0).to(tl.float32)
        b = tl.load(pointer + offsets + half + e, mask=rows & (e < E - half), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(pointer, a, b, offsets, rows, E: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of load_pairs, in the dtype at pointer."""
    dtype = pointer.dtype.element_ty
    if INTERLEAVED:
        e = tl.arange(0, BLOCK)[None, :]
        x = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (a.shape[0], BLOCK))
        tl.store(pointer + offsets + e, x, mask=rows & (e < E))
    else:
        e = tl.arange(0, BLOCK // 2)[None, :]
        half: tl.constexpr = (E + 1) // 2
        tl.store(pointer + offsets + e, a.to(dtype), mask=rows & (e < half))
        tl.store(pointer + offsets + half + e, b.to(dtype), mask=rows & (e < E - half))


@triton.jit
def load_angles(cos_ptr, sin_ptr, t, h, rows, ROTARY: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin (ROWS, BLOCK / 2) of frames t; 1 and 0 for heads that are not rotated."""
    e = tl.arange(0, BLOCK // 2)[None, :]
    mask = rows & (h < ROTARY)[:, None] & (e < E // 2)
    offsets = t[:, None] * (E // 2) + e
    return tl.load(cos_ptr + offsets, mask=mask, other=1.0), tl.load(sin_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def inverse_rms(a, b, rows, eps, E: tl.constexpr):
    """1 / rms (ROWS, 1) of heads given as pairs, 0 beyond the last head."""
    squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
    return tl.where(rows, 1.0 / tl.sqrt(squares / E + eps)[:, None], 0.0)
