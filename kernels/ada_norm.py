"""Adaptive layer norm (adaLN): y = layer_norm(x) * (1 + scale) + shift.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", sec. 3.2.

Dims:     N rows of the batch, C conditions (C divides N, row n has condition n mod C), T frames, D width.
Shapes:   x, y (N, T, D); scale, shift (C, D) or (C, T, D), any row stride; statistics (2, N, T) fp32: mean, 1 / std.
Numerics: the norm has no learned affine; statistics and sums in fp32, y in x's dtype; no atomics, deterministic.
Traffic:  with (C, D) modulations, forward 2 N T D elements (x, y), backward 3 (dy, x, dx).
"""

import torch
import torch.nn.functional as F

from . import _native, _tiles
from ._backend import backend_of, tl, triton
from ._launch import TILES, UNSPECIALIZED, launch, tile_settings
from ._library import Operation, once_differentiable
from ._rows import (
    CHUNK,
    ceil_div,
    check_rows,
    empty_like,
    fit_modulation,
    over_time,
    row_strides,
    split_rows,
    unit_stride,
)
from ._sums import finish_sums


def ada_norm_ref(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    normed = split_rows(F.layer_norm(x, x.shape[-1:], eps=eps), scale.shape[0])
    return (normed * (1 + over_time(scale)) + over_time(shift)).flatten(0, 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _ada_norm_fwd_kernel(
    x_ptr,  # (N, T, D)
    scale_ptr,  # (C, D), or (C, T, D) if PER_FRAME
    shift_ptr,  # as scale
    y_ptr,  # (N, T, D) contiguous
    mean_ptr,  # (2, N, T) fp32: mean, rstd
    frames,
    conditions,
    x_n,
    x_t,
    scale_c,
    scale_t,
    shift_c,
    shift_t,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PER_FRAME: tl.constexpr,
):
    rstd_ptr = mean_ptr + _tiles.plane_size(frames, 1, ROWS, True)
    n, first = _tiles.span_of_program(frames, ROWS)
    c = n % conditions
    t = first + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    rows, inside = t < frames, (d < D)[None, :]
    mask = rows[:, None] & inside
    x = _tiles.load_rows(x_ptr, n, t, x_n, x_t, d, mask)
    mean, rstd = _tiles.row_statistics(x, inside, eps, D)
    if PER_FRAME:
        scale = _tiles.load_rows(scale_ptr, c, t, scale_c, scale_t, d, mask)
        shift = _tiles.load_rows(shift_ptr, c, t, shift_c, shift_t, d, mask)
    else:
        scale = _tiles.load_modulation(scale_ptr, c, scale_c, d, D)
        shift = _tiles.load_modulation(shift_ptr, c, shift_c, d, D)
    y = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
    _tiles.store_rows(y_ptr, y, n, t, frames, d, mask, D)
    tl.store(mean_ptr + n * frames + t, mean, mask=rows)
    tl.store(rstd_ptr + n * frames + t, rstd, mask=rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _ada_norm_bwd_kernel(
    dy_ptr,  # (N, T, D)
    x_ptr,  # (N, T, D)
    scale_ptr,  # (C, D), or (C, T, D) if PER_FRAME
    mean_ptr,  # (2, N, T) fp32: mean, rstd
    dx_ptr,  # (N, T, D) contiguous
    sums_ptr,  # of dscale and dshift, (2, N, chunks, D) fp32 over CHUNK frames each, or (2, N, T, D) if PER_FRAME
    frames,
    conditions,
    dy_n,
    dy_t,
    x_n,
    x_t,
    scale_c,
    scale_t,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PER_FRAME: tl.constexpr,
):
    rstd_ptr = mean_ptr + _tiles.plane_size(frames, 1, CHUNK, True)
    dshift_ptr = sums_ptr + _tiles.plane_size(frames, D, CHUNK, PER_FRAME)
    n, first = _tiles.span_of_program(frames, CHUNK)
    c = n % conditions
    d = tl.arange(0, BLOCK)
    inside = (d < D)[None, :]
    if not PER_FRAME:
        scale = _tiles.load_modulation(scale_ptr, c, scale_c, d, D)
    dscale = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
        t = first + start + tl.arange(0, ROWS)
        rows = t < frames
        mask = rows[:, None] & inside
        dy = _tiles.load_rows(dy_ptr, n, t, dy_n, dy_t, d, mask)
        xhat, rstd = _tiles.load_normalised(x_ptr, mean_ptr, rstd_ptr, n, t, frames, x_n, x_t, d, mask)
        if PER_FRAME:
            scale = _tiles.load_rows(scale_ptr, c, t, scale_c, scale_t, d, mask)
            _tiles.store_rows(sums_ptr, dy * xhat, n, t, frames, d, mask, D)
            _tiles.store_rows(dshift_ptr, dy, n, t, frames, d, mask, D)
        else:
            dscale += dy * xhat
            dshift += dy
        dx = _tiles.norm_backward(dy * (1.0 + scale), xhat, rstd, D)
        _tiles.store_rows(dx_ptr, dx, n, t, frames, d, mask, D)
    if not PER_FRAME:
        _tiles.store_sums(sums_ptr, dscale, d, D)
        _tiles.store_sums(dshift_ptr, dshift, d, D)


def _outputs(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    return empty_like(x), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


def _forward(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    n, frames, width = x.shape
    y, statistics = outputs = _outputs(x, scale, shift, eps)
    tensors, conditions, strides = (x, scale, shift, y), scale.shape[0], row_strides(x, scale, shift)
    if backend_of(x) == "native":
        _native.call("ada_norm_fwd", x.dtype, *tensors, *statistics, n, frames, width, conditions, *strides, eps)
    else:
        settings = tile_settings("ada_norm_fwd", width)
        grid = (n * ceil_div(frames, settings["ROWS"]), 1, 1)
        sizes, per_frame = (frames, conditions), scale.ndim == 3
        tensors += (statistics,)
        launch(_ada_norm_fwd_kernel, grid, tensors, sizes, strides, eps, PER_FRAME=per_frame, **settings)
    return outputs


def _gradients(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, statistics: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return empty_like(x), scale.new_empty((2, *scale.shape))


def _backward(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, statistics: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return dx, and dscale and dshift in one tensor."""
    n, frames, width = x.shape
    dy, dx, per_frame, native = unit_stride(dy), empty_like(x), scale.ndim == 3, backend_of(x) == "native"
    chunk = CHUNK if native else TILES["ada_norm_bwd"].chunk
    pieces = ceil_div(frames, chunk)
    sums = x.new_empty((2, n, frames if per_frame else pieces, width), dtype=torch.float32)
    conditions, strides = scale.shape[0], row_strides(dy, x, scale)
    if native:
        sizes = (n, frames, width, conditions, 1 if per_frame else chunk)
        _native.call("ada_norm_bwd", x.dtype, dy, x, scale, *statistics, dx, *sums, *sizes, *strides)
    else:
        constants = {"CHUNK": chunk, "STAGES": TILES["ada_norm_bwd"].stages, "PER_FRAME": per_frame}
        settings, sizes = tile_settings("ada_norm_bwd", width), (frames, conditions)
        tensors = (dy, x, scale, statistics, dx, sums)
        launch(_ada_norm_bwd_kernel, (n * pieces, 1, 1), tensors, sizes, strides, **constants, **settings)
    return dx, finish_sums(sums, scale, 2)


_ada_norm = Operation(
    "ada_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor)", _forward, _outputs, 1
)
_ada_norm_backward = Operation(
    "ada_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor statistics) -> (Tensor, Tensor)",
    _backward,
    _gradients,
)


def _save(ctx, inputs, output) -> None:
    x, scale, _, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, statistics)


@once_differentiable("ada_norm")
def _differentiate(ctx, dy, *_) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    dx, dmodulations = _ada_norm_backward(dy, *ctx.saved_tensors)
    dscale, dshift = dmodulations.unbind(0)
    return dx, dscale, dshift, None


_ada_norm.differentiate(_differentiate, _save)


def ada_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return the modulated layer norm of x (N, T, D) in x's dtype. scale and shift (C, D) or (C, T, D) are cast to it.

    Raises ValueError with the wanted shape, device or stride if a tensor does not fit (the last dimension must be
    contiguous), or if the C conditions do not divide the N rows.
    """
    check_rows("x", x)
    scale, shift = fit_modulation("scale", scale, x), fit_modulation("shift", shift, x)
    if scale.shape != shift.shape:
        raise ValueError(f"shift is {tuple(shift.shape)}, wanted that of scale, {tuple(scale.shape)}")
    if backend_of(x) == "reference":
        return ada_norm_ref(x, scale, shift, eps)
    return _ada_norm(x, scale, shift, float(eps))
