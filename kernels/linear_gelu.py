"""Linear layer followed by GELU: y = gelu(x W^T + b), exact (erf) or tanh.

Hendrycks & Gimpel 2016. The released AG-REPA uses the exact form, F5-TTS and CosyVoice 3 the tanh form.

Dims:     M rows (all leading dimensions of x), K input width, E output width.
Shapes:   x (..., K); weight (E, K), any row stride; bias (E,) or None; y and z = x W^T, without the bias, (..., E).
Numerics: the GEMMs in the input's dtype with fp32 accumulators; bias, GELU and its derivative in fp32; db from fp32
          partial sums per chunk of rows; no atomics, deterministic.
Traffic:  beside the GEMMs, forward 2 M E elements (z, y), backward 3 (dy, z, dz).
"""

import torch
import torch.nn.functional as F

from . import _native
from ._backend import backend_of, tl, triton
from ._launch import UNSPECIALIZED, launch
from ._library import Operation, once_differentiable
from ._rows import ceil_div, check_tensor, empty_like
from ._sums import finish_sums

_APPROXIMATE = {"erf": "none", "tanh": "tanh"}
_CHUNK = 64  # rows per partial sum of the bias gradient; fixed, so that results repeat bit for bit
_TILE = {"BLOCK": 1024, "ROWS": 2, "num_warps": 4}  # 16 elements per thread; 128-bit loads, of the bias too


def linear_gelu_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str = "erf"
) -> torch.Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=_APPROXIMATE[gelu])


@triton.jit
def _tanh(u):
    """tanh by an odd polynomial (Cephes) for |u| < 0.625, and 1 - 2 / (exp(2 |u|) + 1) beyond."""
    size, square = tl.abs(u), u * u
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    outside = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 40.0)) + 1.0)
    return tl.where(size < 0.625, u + u * square * p, tl.where(u < 0.0, -outside, outside))


@triton.jit
def _odd_part(z, TANH: tl.constexpr):
    """2 gelu(z) / z - 1 of an fp32 tile: erf or tanh."""
    return _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)) if TANH else tl.erf(z * 0.7071067811865476)


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    return 0.5 * z * (1.0 + _odd_part(z, TANH))


@triton.jit
def _slope(z, TANH: tl.constexpr):
    """gelu'(z) of an fp32 tile."""
    odd = _odd_part(z, TANH)
    if TANH:
        steepness = (1.0 - odd * odd) * 0.3989422804014327 * (1.0 + 0.134145 * z * z)
    else:
        steepness = tl.exp(-0.5 * z * z) * 0.3989422804014327
    return 0.5 * (1.0 + odd) + z * steepness


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gelu_fwd_kernel(
    z_ptr,  # (groups, M, E) contiguous
    bias_ptr,  # (groups, E), or None
    y_ptr,  # (groups, M, E) contiguous; may be z
    rows,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TANH: tl.constexpr,
):
    group = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (m < rows)[:, None] & (e < E)[None, :]
    offsets = (group * rows + m.to(tl.int64)[:, None]) * E + e[None, :]  # int64: M*E overflows int32
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + group * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, _gelu(z, TANH).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gelu_bwd_kernel(
    dy_ptr,  # (groups, M, E) contiguous
    z_ptr,  # (groups, M, E) contiguous
    bias_ptr,  # (groups, E), or None
    dz_ptr,  # (groups, M, E) contiguous; may be dy
    dbias_ptr,  # (groups, chunks, E) fp32, sums over CHUNK rows
    rows,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TANH: tl.constexpr,
):
    group = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.zeros((BLOCK,), dtype=tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + group * E + e, mask=e < E, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        m = chunk * CHUNK + start + tl.arange(0, ROWS)
        mask = (m < rows)[:, None] & (e < E)[None, :]
        offsets = (group * rows + m.to(tl.int64)[:, None]) * E + e[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dz = dy * _slope(z, TANH)
        dbias += dz
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    piece = (group * tl.num_programs(0) + chunk) * E
    tl.store(dbias_ptr + piece + e, tl.sum(dbias, axis=0), mask=e < E)


def _sizes(z: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, int, int]:
    groups, width = bias.shape if bias is not None and bias.ndim == 2 else (1, z.shape[-1])
    return groups, z.numel() // max(groups * width, 1), width


def gelu_rows(z: torch.Tensor, bias: torch.Tensor | None, tanh: bool, y: torch.Tensor) -> None:
    """Write gelu(z + bias) to y, given contiguous z (groups, M, E) and bias (groups, E), or (..., E) and (E,). y may be
    z."""
    groups, rows, width = _sizes(z, bias)
    if backend_of(z) == "native":
        _native.call("gelu_fwd", z.dtype, z, bias, y, groups, rows, width, tanh)
    else:
        grid = (ceil_div(rows, _TILE["ROWS"]), ceil_div(width, _TILE["BLOCK"]), groups)
        launch(_gelu_fwd_kernel, grid, (z, bias, y), (rows,), (), E=width, TANH=tanh, **_TILE)


def gelu_rows_backward(
    dy: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, tanh: bool, dz: torch.Tensor
) -> torch.Tensor:
    """Write dy gelu'(z + bias) to dz, all contiguous and shaped as in gelu_rows. Return its sums over _CHUNK rows each,
    (groups, chunks, E) fp32. dz may be dy."""
    groups, rows, width = _sizes(z, bias)
    dbias = z.new_empty((groups, ceil_div(rows, _CHUNK), width), dtype=torch.float32)
    if backend_of(z) == "native":
        _native.call("gelu_bwd", z.dtype, dy, z, bias, dz, dbias, groups, rows, width, _CHUNK, tanh)
    else:
        grid, tensors = (dbias.shape[1], ceil_div(width, _TILE["BLOCK"]), groups), (dy, z, bias, dz, dbias)
        launch(_gelu_bwd_kernel, grid, tensors, (rows,), (), E=width, CHUNK=_CHUNK, TANH=tanh, **_TILE)
    return dbias


def _outputs(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tanh: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape) if keep else None


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tanh: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y (..., E), and z with `keep`, for the backward."""
    z = F.linear(x, weight).contiguous()
    y = empty_like(z) if keep else z
    gelu_rows(z, bias, tanh, y)
    return y, z if keep else None


def _gradients(
    dy: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return empty_like(z), None if bias is None else empty_like(bias)


def _backward(
    dy: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dz = empty_like(z)
    sums = gelu_rows_backward(dy.contiguous(), z, bias, tanh, dz)
    return dz, None if bias is None else finish_sums(sums, bias)


_linear_gelu = Operation(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool tanh, bool keep) -> (Tensor, Tensor)",
    _forward,
    _outputs,
    1,
)
_linear_gelu_backward = Operation(
    "linear_gelu_backward(Tensor dy, Tensor z, Tensor? bias, bool tanh) -> (Tensor, Tensor)", _backward, _gradients
)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.tanh, _ = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, z)


@once_differentiable("linear_gelu")
def _differentiate(ctx, dy, *_) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, weight, bias, z = ctx.saved_tensors
    dz, dbias = _linear_gelu_backward(dy, z, bias, ctx.tanh)
    dx = dz @ weight if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:
        dweight = dz.view(-1, dz.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dx, dweight, None if bias is None else dbias, None, None


_linear_gelu.differentiate(_differentiate, _save)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str) -> None:
    if gelu not in _APPROXIMATE:
        raise ValueError(f"gelu={gelu!r}: erf or tanh")
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, wanted floating point (..., K)")
    check_tensor("weight", weight, ("E", x.shape[-1]), x)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str = "erf") -> torch.Tensor:
    """Return gelu(x W^T + b) (..., E) in x's dtype, or in autocast's, as a linear layer does.

    Raises ValueError if gelu is neither erf nor tanh, or with the wanted shape, device, stride or dtype if a tensor
    does not fit.
    """
    _check(x, weight, bias, gelu)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, wanted x's {x.dtype} (or autocast)")
    if backend_of(x) == "reference":
        return linear_gelu_ref(x, weight, bias, gelu)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _linear_gelu(x, weight, bias, gelu == "tanh", keep)
