"""Gated residual update: h' = h + m * gate * f, then the next adaLN of h', and on request the time-sum of h'.

adaLN-gated residual of Peebles & Xie 2023 (DiT), with the ablation gate m of AG-REPA's FoG-A (arXiv 2603.01006).

Dims:     N rows, C conditions (C divides N, row n has condition n mod C), T frames, D width.
Shapes:   h, f, h', y (N, T, D); gate, scale, shift (C, D) or (C, T, D), any row stride; m (N,) in [0, 1]; lengths (C,);
          time_sum (N, D) fp32; statistics (2, N, T) fp32: mean, 1 / std.
Numerics: fp32 inside; a row with m = 0 returns h bit for bit and gives f no gradient, even if f is not finite; time_sum
          adds the valid frames in fp32; no atomics, deterministic.
Traffic:  with (C, D) modulations, forward 4 N T D elements (h, f, h', y), backward 6 (dh', dy, f, h', dh, df); without
          the norm 3 and 3 (dh', f, df: dh is dh' itself). The time-sum adds none to the forward; its gradient is one
          (N, D) row, and then dh is written.
"""

from itertools import chain
from typing import NamedTuple

import torch

from . import _native, _tiles
from ._backend import backend_of, tl, triton
from ._launch import TILES, UNSPECIALIZED, launch, tile_settings
from ._library import Operation, once_differentiable
from ._rows import (
    CHUNK,
    ceil_div,
    check_rows,
    check_tensor,
    empty_like,
    fit_modulation,
    over_time,
    row_strides,
    split_rows,
    unit_stride,
    valid_frames,
)
from ._sums import finish_sums
from .ada_norm import ada_norm_ref


class GatedResidual(NamedTuple):
    h: torch.Tensor  # (N, T, D)
    y: torch.Tensor | None  # (N, T, D), the modulated norm of h, if scale and shift were given
    time_sum: torch.Tensor | None  # (N, D) fp32, on request


def gated_residual_ref(
    h: torch.Tensor,
    f: torch.Tensor,
    gate: torch.Tensor,
    m: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    time_sum: bool = False,
    eps: float = 1e-6,
) -> GatedResidual:
    if m is not None:  # f too: 0 times a branch that is not finite would reach the gradients as NaN
        rows = m.view(-1, 1, 1).to(h.dtype)
        f = torch.where(rows == 0, 0, f)
    update = (split_rows(f, gate.shape[0]) * over_time(gate)).flatten(0, 1)
    out = h + update if m is None else torch.where(rows == 0, h, h + rows * update)
    y = None if scale is None else ada_norm_ref(out, scale, shift, eps)
    total = None
    if time_sum:
        total = out if out.dtype == torch.float64 else out.float()
        if lengths is not None:
            mask = valid_frames(lengths, h.shape[1])[..., None]
            total = torch.where(mask, split_rows(total, lengths.shape[0]), 0).flatten(0, 1)
        total = total.sum(1)
    return GatedResidual(out, y, total)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gated_residual_fwd_kernel(
    h_ptr,  # (N, T, D)
    f_ptr,  # (N, T, D)
    gate_ptr,  # (C, D), or (C, T, D) if PER_FRAME
    m_ptr,  # (N,) fp32, or None: 1
    scale_ptr,  # as gate, or None: no norm
    shift_ptr,  # as scale
    lengths_ptr,  # (length_count,) int64, or None: all frames are valid
    out_ptr,  # h', (N, T, D) contiguous
    y_ptr,  # (N, T, D) contiguous, None without norm
    sums_ptr,  # (N, spans, D) fp32, or None: no time-sum
    mean_ptr,  # (2, N, T) fp32: mean, rstd; None without norm
    frames,
    conditions,
    length_count,
    h_n,
    h_t,
    f_n,
    f_t,
    gate_c,
    gate_t,
    scale_c,
    scale_t,
    shift_c,
    shift_t,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    PER_FRAME: tl.constexpr,
):
    n, first = _tiles.span_of_program(frames, SPAN)
    c = n % conditions
    d = tl.arange(0, BLOCK)
    inside = (d < D)[None, :]
    valid = frames
    if lengths_ptr is not None:
        valid = tl.load(lengths_ptr + n % length_count)
    m = 1.0
    if m_ptr is not None:
        m = tl.load(m_ptr + n)
    if not PER_FRAME:
        gate = _tiles.load_modulation(gate_ptr, c, gate_c, d, D)
        if scale_ptr is not None:
            scale = _tiles.load_modulation(scale_ptr, c, scale_c, d, D)
            shift = _tiles.load_modulation(shift_ptr, c, shift_c, d, D)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, SPAN, ROWS):
        t = first + start + tl.arange(0, ROWS)
        rows = t < frames
        mask = rows[:, None] & inside
        if PER_FRAME:
            gate = _tiles.load_rows(gate_ptr, c, t, gate_c, gate_t, d, mask)
        h = _tiles.load_rows(h_ptr, n, t, h_n, h_t, d, mask)
        out = h + m * gate * _tiles.load_rows(f_ptr, n, t, f_n, f_t, d, mask)
        if m_ptr is not None:
            out = tl.where(m == 0.0, h, out)
        out = out.to(out_ptr.dtype.element_ty).to(tl.float32)  # norm and sum see h' as it is stored
        _tiles.store_rows(out_ptr, out, n, t, frames, d, mask, D)
        if sums_ptr is not None:
            sums += tl.where((t < valid)[:, None] & mask, out, 0.0)
        if scale_ptr is not None:
            if PER_FRAME:
                scale = _tiles.load_rows(scale_ptr, c, t, scale_c, scale_t, d, mask)
                shift = _tiles.load_rows(shift_ptr, c, t, shift_c, shift_t, d, mask)
            mean, rstd = _tiles.row_statistics(out, inside, eps, D)
            y = (out - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
            _tiles.store_rows(y_ptr, y, n, t, frames, d, mask, D)
            tl.store(mean_ptr + n * frames + t, mean, mask=rows)
            rstd_ptr = mean_ptr + _tiles.plane_size(frames, 1, SPAN, True)
            tl.store(rstd_ptr + n * frames + t, rstd, mask=rows)
    if sums_ptr is not None:
        _tiles.store_sums(sums_ptr, sums, d, D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gated_residual_bwd_kernel(
    dout_ptr,  # of h', (N, T, D), or None: nothing used h'
    dy_ptr,  # (N, T, D), or None: no norm, or nothing used y
    dsum_ptr,  # (N, D) fp32 contiguous, or None
    f_ptr,  # (N, T, D)
    out_ptr,  # h', (N, T, D) contiguous, None without dy
    gate_ptr,  # (C, D), or (C, T, D) if PER_FRAME
    m_ptr,  # (N,) fp32, or None: 1
    scale_ptr,  # as gate, None without dy
    lengths_ptr,  # (length_count,) int64, or None: all frames are valid
    mean_ptr,  # (2, N, T) fp32: mean, rstd; None without dy
    dh_ptr,  # (N, T, D) contiguous, or None: dh is dout
    df_ptr,  # (N, T, D) contiguous
    sums_ptr,  # (1 or 3, N, chunks, D) fp32 over CHUNK frames each, or (1 or 3, N, T, D) if PER_FRAME: of dgate before
    # m, and with dy of dscale and dshift
    frames,
    conditions,
    length_count,
    dout_n,
    dout_t,
    dy_n,
    dy_t,
    f_n,
    f_t,
    gate_c,
    gate_t,
    scale_c,
    scale_t,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PER_FRAME: tl.constexpr,
):
    plane = _tiles.plane_size(frames, D, CHUNK, PER_FRAME)
    dscale_ptr, dshift_ptr = sums_ptr + plane, sums_ptr + 2 * plane
    n, first = _tiles.span_of_program(frames, CHUNK)
    c = n % conditions
    d = tl.arange(0, BLOCK)
    inside = (d < D)[None, :]
    valid = frames
    if lengths_ptr is not None:
        valid = tl.load(lengths_ptr + n % length_count)
    m = 1.0
    if m_ptr is not None:
        m = tl.load(m_ptr + n)
    if not PER_FRAME:
        gate = _tiles.load_modulation(gate_ptr, c, gate_c, d, D)
        if dy_ptr is not None:
            scale = _tiles.load_modulation(scale_ptr, c, scale_c, d, D)
    if dsum_ptr is not None:
        dsum = tl.load(dsum_ptr + n * D + d, mask=d < D, other=0.0)[None, :]
    dgate = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dscale = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
        t = first + start + tl.arange(0, ROWS)
        rows = t < frames
        mask = rows[:, None] & inside
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)  # gradient of h' from all its uses
        if dout_ptr is not None:
            total += _tiles.load_rows(dout_ptr, n, t, dout_n, dout_t, d, mask)
        if dsum_ptr is not None:
            total += tl.where((t < valid)[:, None] & mask, dsum, 0.0)
        if dy_ptr is not None:
            dy = _tiles.load_rows(dy_ptr, n, t, dy_n, dy_t, d, mask)
            rstd_ptr = mean_ptr + _tiles.plane_size(frames, 1, CHUNK, True)
            xhat, rstd = _tiles.load_normalised(out_ptr, mean_ptr, rstd_ptr, n, t, frames, frames * D, D, d, mask)
            if PER_FRAME:
                scale = _tiles.load_rows(scale_ptr, c, t, scale_c, scale_t, d, mask)
                _tiles.store_rows(dscale_ptr, dy * xhat, n, t, frames, d, mask, D)
                _tiles.store_rows(dshift_ptr, dy, n, t, frames, d, mask, D)
            else:
                dscale += dy * xhat
                dshift += dy
            total += _tiles.norm_backward(dy * (1.0 + scale), xhat, rstd, D)
        if dh_ptr is not None:
            _tiles.store_rows(dh_ptr, total, n, t, frames, d, mask, D)
        f = _tiles.load_rows(f_ptr, n, t, f_n, f_t, d, mask)
        if PER_FRAME:
            gate = _tiles.load_rows(gate_ptr, c, t, gate_c, gate_t, d, mask)
        df, along = m * gate * total, f * total
        if m_ptr is not None:
            df, along = tl.where(m == 0.0, 0.0, df), tl.where(m == 0.0, 0.0, along)
        _tiles.store_rows(df_ptr, df, n, t, frames, d, mask, D)
        if PER_FRAME:
            _tiles.store_rows(sums_ptr, along, n, t, frames, d, mask, D)
        else:
            dgate += along
    if not PER_FRAME:
        _tiles.store_sums(sums_ptr, dgate, d, D)
        if dy_ptr is not None:
            _tiles.store_sums(dscale_ptr, dscale, d, D)
            _tiles.store_sums(dshift_ptr, dshift, d, D)


def _outputs(h, f, gate, m, scale, shift, lengths, time_sum, eps) -> tuple[torch.Tensor | None, ...]:
    n, frames, width = h.shape
    total = h.new_empty((n, width), dtype=torch.float32) if time_sum else None
    if scale is None:
        return empty_like(h), None, total, None
    return empty_like(h), empty_like(h), total, h.new_empty((2, n, frames), dtype=torch.float32)


def _forward(h, f, gate, m, scale, shift, lengths, time_sum, eps) -> tuple[torch.Tensor | None, ...]:
    n, frames, width = h.shape
    out, y, _, statistics = _outputs(h, f, gate, m, scale, shift, lengths, False, eps)
    native, settings = backend_of(h) == "native", tile_settings("gated_residual_fwd", width)
    span = settings["ROWS"]
    if time_sum:
        span = CHUNK if native else TILES["gated_residual_fwd"].chunk
    sums = h.new_empty((n, ceil_div(frames, span), width), dtype=torch.float32) if time_sum else None
    tensors = (h, f, gate, m, scale, shift, lengths, out, y, sums)
    sizes = (gate.shape[0], 1 if lengths is None else lengths.shape[0])
    strides = row_strides(h, f, gate, scale, shift)
    if native:
        tensors += (None, None) if statistics is None else tuple(statistics)
        _native.call("gated_residual_fwd", h.dtype, *tensors, n, frames, width, *sizes, span, *strides, eps)
    else:
        grid, constants = (n * ceil_div(frames, span), 1, 1), {"SPAN": span, "PER_FRAME": gate.ndim == 3}
        arguments = (*tensors, statistics), (frames, *sizes), strides, eps
        launch(_gated_residual_fwd_kernel, grid, *arguments, **constants, **settings)
    return out, y, sums.sum(1) if time_sum else None, statistics


def _gradients(dout, dy, dsum, f, out, gate, m, scale, lengths, statistics) -> tuple[torch.Tensor | None, ...]:
    dm = None if m is None else f.new_empty(f.shape[0], dtype=torch.float32)
    dmodulations = gate.new_empty((1 if dy is None else 3, *gate.shape))
    return None if dy is None and dsum is None else empty_like(f), empty_like(f), dmodulations, dm


def _backward(dout, dy, dsum, f, out, gate, m, scale, lengths, statistics) -> tuple[torch.Tensor | None, ...]:
    """Return dh (None: it is dout), df, the gradients of gate and with dy of scale and shift in one tensor, and dm."""
    n, frames, width = f.shape
    native, per_frame = backend_of(f) == "native", gate.ndim == 3
    chunk = CHUNK if native else TILES["gated_residual_bwd"].chunk
    dout, dy = (None if d is None else unit_stride(d) for d in (dout, dy))
    dsum = None if dsum is None else dsum.contiguous()
    dh, df = None if dy is None and dsum is None else empty_like(f), empty_like(f)
    if dy is None:
        out = scale = statistics = None
    planes, pieces = 1 if dy is None else 3, ceil_div(frames, chunk)
    sums = f.new_empty((planes, n, frames if per_frame else pieces, width), dtype=torch.float32)
    inputs = (dout, dy, dsum, f, out, gate, m, scale, lengths)
    sizes = (gate.shape[0], 1 if lengths is None else lengths.shape[0])
    strides = row_strides(dout, dy, f, gate, scale)
    if native:
        results = ((None, None) if statistics is None else statistics), (dh, df), sums, [None] * (3 - planes)
        sizes = (n, frames, width, *sizes, 1 if per_frame else chunk)
        _native.call("gated_residual_bwd", f.dtype, *inputs, *chain(*results), *sizes, *strides)
    else:
        constants = {"CHUNK": chunk, "STAGES": TILES["gated_residual_bwd"].stages, "PER_FRAME": per_frame}
        settings, grid = tile_settings("gated_residual_bwd", width), (n * pieces, 1, 1)
        arguments = (*inputs, statistics, dh, df, sums), (frames, *sizes), strides
        launch(_gated_residual_bwd_kernel, grid, *arguments, **constants, **settings)
    dm = None
    if m is not None:
        along = sums[0]  # sums of f * dh', before m and gate
        weighted = split_rows(along if per_frame else along.sum(1, keepdim=True), gate.shape[0])
        dm = (weighted * over_time(gate).float()).sum((-2, -1)).flatten()
        along.mul_(m.view(-1, 1, 1))
    return dh, df, finish_sums(sums, gate, planes), dm


_gated_residual = Operation(
    "gated_residual(Tensor h, Tensor f, Tensor gate, Tensor? m, Tensor? scale, Tensor? shift, Tensor? lengths,"
    " bool time_sum, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _outputs,
    3,
)
_gated_residual_backward = Operation(
    "gated_residual_backward(Tensor? dout, Tensor? dy, Tensor? dsum, Tensor f, Tensor out, Tensor gate, Tensor? m,"
    " Tensor? scale, Tensor? lengths, Tensor? statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _gradients,
)


def _save(ctx, inputs, output) -> None:
    _, f, gate, m, scale, _, lengths, time_sum, _ = inputs
    out, _, _, statistics = output
    ctx.set_materialize_grads(False)
    ctx.time_sum, ctx.gated, ctx.normed = time_sum, m is not None, scale is not None
    if statistics is not None:
        ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(f, out, gate, m, scale, lengths, statistics)


@once_differentiable("gated_residual")
def _differentiate(ctx, dout, dy, dsum, *_) -> tuple[torch.Tensor | None, ...]:
    dy = dy if ctx.normed else None  # without norm and time-sum, the operator's y and total are empty tensors
    dsum = dsum if ctx.time_sum else None
    if dout is None and dy is None and dsum is None:
        return (None,) * 9
    dh, df, dmodulations, dm = _gated_residual_backward(dout, dy, dsum, *ctx.saved_tensors)
    dgate, dscale, dshift = dmodulations.unbind(0) if dy is not None else (dmodulations[0], None, None)
    if dy is None and dsum is None:
        dh = dout
    return dh, df, dgate, dm if ctx.gated else None, dscale, dshift, None, None, None


_gated_residual.differentiate(_differentiate, _save)


def gated_residual(
    h: torch.Tensor,
    f: torch.Tensor,
    gate: torch.Tensor,
    m: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    time_sum: bool = False,
    eps: float = 1e-6,
) -> GatedResidual:
    """Return h' (N, T, D) in h's dtype, its modulated norm if scale and shift are given, and its masked time-sum on
    request. f and the modulations are cast to h's dtype.

    Raises ValueError with the wanted shape, device or stride if a tensor does not fit, if the conditions do not divide
    the rows, or if only one of scale and shift is given.
    """
    check_rows("h", h)
    if f.shape != h.shape or f.stride(2) != 1 or f.device != h.device:
        check_tensor("f", f, tuple(h.shape), h)
    f, gate = f if f.dtype == h.dtype else f.to(h.dtype), fit_modulation("gate", gate, h)
    if m is not None:
        m = m.contiguous() if h.dtype == torch.float64 else m.float().contiguous()  # m may be a column of (N, 2) gates
        check_tensor("m", m, h.shape[:1], h)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together: one of them is missing")
    if scale is not None:
        scale, shift = fit_modulation("scale", scale, h), fit_modulation("shift", shift, h)
        if not scale.shape == shift.shape == gate.shape:
            raise ValueError(f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)}: wanted gate's shape")
    if lengths is not None:
        check_tensor("lengths", lengths, ("C",), h)
        if h.shape[0] % lengths.shape[0]:
            raise ValueError(f"{h.shape[0]} rows over {lengths.shape[0]} lengths: the lengths must divide the rows")
        lengths = lengths.long()
    if backend_of(h) == "reference":
        return gated_residual_ref(h, f, gate, m, scale=scale, shift=shift, lengths=lengths, time_sum=time_sum, eps=eps)
    if not time_sum:
        lengths = None  # they mask nothing else
    out, y, total = _gated_residual(h, f, gate, m, scale, shift, lengths, time_sum, float(eps))
    return GatedResidual(out, None if scale is None else y, total if time_sum else None)
