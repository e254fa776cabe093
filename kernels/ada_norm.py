"""Adaptive layer norm (adaLN): y = layer_norm(x) * (1 + scale) + shift.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", sec. 3.2.

Dims:     N rows of the batch, C conditions (C divides N, row n has condition n mod C), T frames, D width.
Shapes:   x, y (N, T, D); scale, shift (C, D) or (C, T, D), any row stride; mean, rstd (N, T) fp32.
Numerics: the norm has no learned affine; statistics and sums in fp32, y in x's dtype; no atomics, deterministic.
Traffic:  with (C, D) modulations, forward 2 N T D elements (x, y), backward 3 (dy, x, dx).
"""

import torch
import torch.nn.functional as F

from . import _native
from ._backend import backend_of, tl, triton
from ._library import define, differentiate
from ._rows import (
    BACKWARD_TILE,
    CHUNK,
    check_rows,
    fit_modulation,
    modulation_strides,
    over_time,
    per_condition,
    row_tile,
    split_rows,
    unit_stride,
)


def ada_norm_ref(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    normed = split_rows(F.layer_norm(x, x.shape[-1:], eps=eps), scale.shape[0])
    return (normed * (1 + over_time(scale)) + over_time(shift)).flatten(0, 1)


@triton.jit
def row_statistics(x, inside, eps, D: tl.constexpr):
    """Mean and 1 / std of the rows of an fp32 tile (ROWS, BLOCK); `inside` (1, BLOCK) masks columns beyond D."""
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)


@triton.jit
def norm_backward(g, xhat, rstd, D: tl.constexpr):
    """dx of rows whose normalised values are xhat, from g = dy (1 + scale)."""
    along = tl.sum(g * xhat, axis=1) / D
    total = tl.sum(g, axis=1) / D
    return (g - total[:, None] - xhat * along[:, None]) * rstd[:, None]


@triton.jit
def load_rows(pointer, n, t, stride_n, stride_t, d, mask):
    """Rows t of batch row n as an fp32 tile (ROWS, BLOCK), zero where the mask is off."""
    offsets = n * stride_n + t.to(tl.int64)[:, None] * stride_t + d[None, :]  # int64: N*T*D overflows int32
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, tile, n, t, frames, d, mask, D: tl.constexpr):
    """Write a tile into rows t of the contiguous (N, T, D) tensor at pointer, in its dtype."""
    offsets = (n * frames + t.to(tl.int64)[:, None]) * D + d[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _ada_norm_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, frames, conditions,
    x_n, x_t, scale_n, scale_t, shift_n, shift_t, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PER_FRAME: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(frames, ROWS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    c = n % conditions
    t = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    rows, inside = t < frames, (d < D)[None, :]
    mask = rows[:, None] & inside
    x = load_rows(x_ptr, n, t, x_n, x_t, d, mask)
    mean, rstd = row_statistics(x, inside, eps, D)
    if PER_FRAME:
        scale = load_rows(scale_ptr, c, t, scale_n, scale_t, d, mask)
        shift = load_rows(shift_ptr, c, t, shift_n, shift_t, d, mask)
    else:
        scale = tl.load(scale_ptr + c * scale_n + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(shift_ptr + c * shift_n + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    y = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
    store_rows(y_ptr, y, n, t, frames, d, mask, D)
    tl.store(mean_ptr + n * frames + t, mean, mask=rows)
    tl.store(rstd_ptr + n * frames + t, rstd, mask=rows)


@triton.jit
def _ada_norm_bwd_kernel(
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dscale_ptr, dshift_ptr, frames, conditions,
    dy_n, dy_t, x_n, x_t, scale_n, scale_t,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PER_FRAME: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(frames, CHUNK)
    n = (tl.program_id(0) // chunks).to(tl.int64)
    c = n % conditions
    first = tl.program_id(0) % chunks * CHUNK
    d = tl.arange(0, BLOCK)
    inside = (d < D)[None, :]
    if not PER_FRAME:
        scale = tl.load(scale_ptr + c * scale_n + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dscale = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        t = first + start + tl.arange(0, ROWS)
        rows = t < frames
        mask = rows[:, None] & inside
        mean = tl.load(mean_ptr + n * frames + t, mask=rows, other=0.0)
        rstd = tl.load(rstd_ptr + n * frames + t, mask=rows, other=0.0)
        dy = load_rows(dy_ptr, n, t, dy_n, dy_t, d, mask)
        xhat = (load_rows(x_ptr, n, t, x_n, x_t, d, mask) - mean[:, None]) * rstd[:, None]
        xhat = tl.where(mask, xhat, 0.0)
        if PER_FRAME:
            scale = load_rows(scale_ptr, c, t, scale_n, scale_t, d, mask)
            store_rows(dscale_ptr, dy * xhat, n, t, frames, d, mask, D)
            store_rows(dshift_ptr, dy, n, t, frames, d, mask, D)
        else:
            dscale += dy * xhat
            dshift += dy
        dx = norm_backward(dy * (1.0 + scale), xhat, rstd, D)
        store_rows(dx_ptr, dx, n, t, frames, d, mask, D)
    if not PER_FRAME:
        piece = tl.program_id(0).to(tl.int64) * D
        tl.store(dscale_ptr + piece + d, tl.sum(dscale, axis=0), mask=d < D)
        tl.store(dshift_ptr + piece + d, tl.sum(dshift, axis=0), mask=d < D)


def _outputs(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _forward(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    n, frames, width = x.shape
    y, mean, rstd = _outputs(x, scale, shift, eps)
    strides = (*x.stride()[:2], *modulation_strides(scale), *modulation_strides(shift))
    if backend_of(x) == "native":
        tensors = (x, scale, shift, y, mean, rstd)
        _native.call("ada_norm_fwd", x.dtype, *tensors, n, frames, width, scale.shape[0], *strides, eps)
    else:
        tile = row_tile(width)
        _ada_norm_fwd_kernel[(n * triton.cdiv(frames, tile["ROWS"]),)](
            x, scale, shift, y, mean, rstd, frames, scale.shape[0], *strides, eps, PER_FRAME=scale.ndim == 3, **tile
        )
    return y, mean, rstd


def _gradients(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _backward(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    n, frames, width = x.shape
    dy, dx, per_frame = unit_stride(dy), x.new_empty(x.shape), scale.ndim == 3
    chunk = 1 if per_frame else CHUNK
    dscale, dshift = (x.new_empty((n, -(-frames // chunk), width), dtype=torch.float32) for _ in range(2))
    strides = (*dy.stride()[:2], *x.stride()[:2], *modulation_strides(scale))
    tensors = (dy, x, scale, mean, rstd, dx, dscale, dshift)
    if backend_of(x) == "native":
        _native.call("ada_norm_bwd", x.dtype, *tensors, n, frames, width, scale.shape[0], chunk, *strides)
    else:
        _ada_norm_bwd_kernel[(n * triton.cdiv(frames, CHUNK),)](
            *tensors,
            frames,
            scale.shape[0],
            *strides,
            CHUNK=CHUNK,
            PER_FRAME=per_frame,
            **row_tile(width, BACKWARD_TILE),
        )
    return dx, per_condition(dscale, scale), per_condition(dshift, scale)


_ada_norm = define(
    "ada_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor, Tensor)", _forward, _outputs
)
_ada_norm_backward = define(
    "ada_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _backward,
    _gradients,
)


def _save(ctx, inputs, output) -> None:
    x, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)


def _differentiate(ctx, dy, _dmean, _drstd) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    return *_ada_norm_backward(dy, *ctx.saved_tensors), None


differentiate("ada_norm", _differentiate, _save)


def ada_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Modulated layer norm of x (N, T, D), in x's dtype; scale and shift are cast to it.

    Raises ValueError naming what was wanted when shapes, devices or strides do not fit (x and the modulations need a
    contiguous last dimension), or when the conditions do not divide the rows.
    """
    check_rows("x", x)
    scale, shift = fit_modulation("scale", scale, x), fit_modulation("shift", shift, x)
    if scale.shape != shift.shape:
        raise ValueError(f"shift is {tuple(shift.shape)}, wanted that of scale, {tuple(scale.shape)}")
    if backend_of(x) == "reference":
        return ada_norm_ref(x, scale, shift, eps)
    return _ada_norm(x, scale, shift, eps)[0]
