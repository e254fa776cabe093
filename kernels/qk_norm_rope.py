"""Queries, keys and values from the packed projection, with per-head RMS norm and rotary positions on q and k.

Rotary: Su et al. 2021 (RoFormer). Pairs are neighbours (interleaved, as in x-transformers and F5-TTS) or halves of the
head. RMS norm: Zhang & Sennrich 2019.

Dims:     N rows, T frames, H heads, E = D / H head width.
Shapes:   qkv (N, T, 3 D) packed as q | k | v, any row stride; cos, sin (T, E / 2); q_weight, k_weight (E,);
          q, k, v (N, H, T, E). q and k are transposed views of (N, T, H, E), v is a view of qkv.
Numerics: fp32 inside with fp32 tables, q and k in qkv's dtype; no atomics, deterministic.
Traffic:  forward 2 passes over q and k (read, write); backward 2 over q, k, v, and one more over q, k with a norm.
"""

import torch
import torch.nn.functional as F

from . import _native
from ._backend import backend_of, tl, triton
from ._launch import UNSPECIALIZED, launch
from ._library import Operation, once_differentiable, wants_gradient
from ._pairs import inverse_rms, load_angles, load_pairs, store_pairs
from ._rows import ceil_div, check_rows, check_tensor, unit_stride


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    heads: int,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    interleaved: bool = True,
    rotary_heads: int | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if q_weight is not None:
        q, k = F.rms_norm(q, q.shape[-1:], q_weight, eps), F.rms_norm(k, k.shape[-1:], k_weight, eps)
    if rope is not None:
        cos, sin = (table.to(q.dtype) for table in rope)
        n = heads if rotary_heads is None else rotary_heads
        q = torch.cat((_rotate(q[:, :n], cos, sin, interleaved), q[:, n:]), dim=1)
        k = torch.cat((_rotate(k[:, :n], cos, sin, interleaved), k[:, n:]), dim=1)
    return q, k, v


@triton.jit
def _forward_part(
    x_ptr,  # q or k of qkv
    weight_ptr,  # (E,), or None: no norm
    y_ptr,  # (N, T, H, E) contiguous
    x_offsets,  # (ROWS, 1), start of each head
    y_offsets,  # (ROWS, 1)
    angles,  # cos and sin (ROWS, BLOCK / 2), or None: no rotation
    rows,
    eps,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    a, b = load_pairs(x_ptr, x_offsets, rows, E, BLOCK, INTERLEAVED)
    if weight_ptr is not None:
        weight_a, weight_b = load_pairs(weight_ptr, tl.zeros_like(x_offsets), rows, E, BLOCK, INTERLEAVED)
        rrms = inverse_rms(a, b, rows, eps, E)
        a, b = a * rrms * weight_a, b * rrms * weight_b
    if angles is not None:
        cos, sin = angles
        a, b = a * cos - b * sin, b * cos + a * sin
    store_pairs(y_ptr, a, b, y_offsets, rows, E, BLOCK, INTERLEAVED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _qk_norm_rope_fwd_kernel(
    x_ptr,  # qkv, (N, T, 3 D)
    cos_ptr,  # (T, E / 2) fp32 contiguous, or None: no rotation
    sin_ptr,  # as cos
    q_weight_ptr,  # (E,), or None: no norm
    k_weight_ptr,  # as q_weight
    q_ptr,  # (N, T, H, E) contiguous
    k_ptr,  # (N, T, H, E) contiguous
    frames,
    x_n,
    x_t,
    eps,
    HEADS: tl.constexpr,
    ROTARY: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    tiles = tl.cdiv(frames * HEADS, ROWS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)  # heads of all frames, one after another
    t, h = row // HEADS, row % HEADS
    rows = (t < frames)[:, None]
    x_offsets = (n * x_n + t.to(tl.int64) * x_t + h * E)[:, None]  # int64: N*T*3D overflows int32
    y_offsets = ((n * frames * HEADS + row) * E)[:, None]
    angles = None
    if cos_ptr is not None:
        angles = load_angles(cos_ptr, sin_ptr, t, h, rows, ROTARY, E, BLOCK)
    if tl.program_id(1) == 0:
        _forward_part(x_ptr, q_weight_ptr, q_ptr, x_offsets, y_offsets, angles, rows, eps, E, BLOCK, INTERLEAVED)
    else:
        x_ptr += HEADS * E
        _forward_part(x_ptr, k_weight_ptr, k_ptr, x_offsets, y_offsets, angles, rows, eps, E, BLOCK, INTERLEAVED)


@triton.jit
def _backward_part(
    dy,  # pointer to (N, H, T, E), its strides over N, H and T
    x,  # pointer to q or k of qkv, its strides over N and T
    rope,  # pointers to cos and sin (T, E / 2) fp32, or Nones: no rotation
    weight_ptr,  # (E,), or None: no norm, and x is not read
    dx_ptr,  # q, k or v of (N, T, 3 D) contiguous
    dw_ptr,  # q's or k's of (programs, 2, E) fp32
    frames,
    eps,
    HEADS: tl.constexpr,
    ROTARY: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    dy_ptr, dy_n, dy_h, dy_t = dy
    x_ptr, x_n, x_t = x
    cos_ptr, sin_ptr = rope
    chunks = tl.cdiv(frames * HEADS, ROWS * STEPS)
    n = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * (ROWS * STEPS)
    if weight_ptr is not None:
        zeros, every = tl.zeros((ROWS, 1), dtype=tl.int32), tl.full((ROWS, 1), 1, dtype=tl.int1)
        weight_a, weight_b = load_pairs(weight_ptr, zeros, every, E, BLOCK, INTERLEAVED)
        sum_a = tl.zeros((ROWS, BLOCK // 2), dtype=tl.float32)
        sum_b = tl.zeros((ROWS, BLOCK // 2), dtype=tl.float32)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        t, h = row // HEADS, row % HEADS
        rows = (t < frames)[:, None]
        long_t, long_h = t.to(tl.int64), h.to(tl.int64)
        dy_offsets = (n * dy_n + long_t * dy_t + long_h * dy_h)[:, None]
        a, b = load_pairs(dy_ptr, dy_offsets, rows, E, BLOCK, INTERLEAVED)
        if cos_ptr is not None:
            cos, sin = load_angles(cos_ptr, sin_ptr, t, h, rows, ROTARY, E, BLOCK)
            a, b = a * cos + b * sin, b * cos - a * sin
        if weight_ptr is not None:
            x_offsets = (n * x_n + long_t * x_t + h * E)[:, None]
            x_a, x_b = load_pairs(x_ptr, x_offsets, rows, E, BLOCK, INTERLEAVED)
            rrms = inverse_rms(x_a, x_b, rows, eps, E)
            x_a, x_b = x_a * rrms, x_b * rrms
            sum_a += a * x_a
            sum_b += b * x_b
            a, b = a * weight_a, b * weight_b
            along = ((tl.sum(a * x_a, axis=1) + tl.sum(b * x_b, axis=1)) / E)[:, None]
            a, b = (a - x_a * along) * rrms, (b - x_b * along) * rrms
        dx_offsets = ((n * frames + long_t) * (3 * HEADS * E) + h * E)[:, None]
        store_pairs(dx_ptr, a, b, dx_offsets, rows, E, BLOCK, INTERLEAVED)
    if weight_ptr is not None:
        piece = tl.zeros((1, 1), dtype=tl.int64) + tl.program_id(0) * (2 * E)
        one = tl.full((1, 1), 1, dtype=tl.int1)
        sum_a, sum_b = tl.sum(sum_a, axis=0)[None, :], tl.sum(sum_b, axis=0)[None, :]
        store_pairs(dw_ptr, sum_a, sum_b, piece, one, E, BLOCK, INTERLEAVED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _qk_norm_rope_bwd_kernel(
    dq_ptr,  # (N, H, T, E)
    dk_ptr,  # (N, H, T, E)
    dv_ptr,  # (N, H, T, E)
    x_ptr,  # qkv, (N, T, 3 D), or None: no norm
    cos_ptr,  # (T, E / 2) fp32 contiguous, or None: no rotation
    sin_ptr,  # as cos
    q_weight_ptr,  # (E,), or None: no norm
    k_weight_ptr,  # as q_weight
    dx_ptr,  # (N, T, 3 D) contiguous
    dw_ptr,  # (programs, 2, E) fp32, empty without norm
    frames,
    dq_n,
    dq_h,
    dq_t,
    dk_n,
    dk_h,
    dk_t,
    dv_n,
    dv_h,
    dv_t,
    x_n,
    x_t,
    eps,
    HEADS: tl.constexpr,
    ROTARY: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    D: tl.constexpr = HEADS * E
    dq, dk, dv = (dq_ptr, dq_n, dq_h, dq_t), (dk_ptr, dk_n, dk_h, dk_t), (dv_ptr, dv_n, dv_h, dv_t)
    xq, xk, rope = (x_ptr, x_n, x_t), (None, 0, 0), (cos_ptr, sin_ptr)
    if x_ptr is not None:
        xk = x_ptr + D, x_n, x_t
    dxk_ptr, dwk_ptr = dx_ptr + D, dw_ptr + E
    part = tl.program_id(1)
    if part == 0:
        _backward_part(
            dq, xq, rope, q_weight_ptr, dx_ptr, dw_ptr, frames, eps, HEADS, ROTARY, E, BLOCK, ROWS, STEPS, INTERLEAVED
        )
    elif part == 1:
        _backward_part(
            dk, xk, rope, k_weight_ptr, dxk_ptr, dwk_ptr, frames, eps, HEADS, ROTARY, E, BLOCK, ROWS, STEPS, INTERLEAVED
        )
    else:  # v: a copy
        no_rope, dxv_ptr = (None, None), dx_ptr + 2 * D
        _backward_part(dv, xq, no_rope, None, dxv_ptr, dw_ptr, frames, eps, HEADS, 0, E, BLOCK, ROWS, STEPS, False)


def _tile(heads: int, width: int) -> dict[str, int]:
    """Return the launch settings: 4096 elements per tile and 16 per thread at 64 elements per head."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"HEADS": heads, "E": width, "BLOCK": block, "ROWS": min(64, max(1, 4096 // block)), "num_warps": 8}


def _outputs(qkv, heads, cos, sin, q_weight, k_weight, interleaved, rotary_heads, eps) -> tuple[torch.Tensor, ...]:
    shape = (*qkv.shape[:2], heads, qkv.shape[2] // (3 * heads))
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _forward(qkv, heads, cos, sin, q_weight, k_weight, interleaved, rotary_heads, eps) -> tuple[torch.Tensor, ...]:
    n, frames, _ = qkv.shape
    q, k = _outputs(qkv, heads, cos, sin, q_weight, k_weight, interleaved, rotary_heads, eps)
    width, strides = q.shape[3], qkv.stride()[:2]
    if backend_of(qkv) == "native":
        tensors = (qkv, cos, sin, _float(q_weight), _float(k_weight), q, k)
        sizes = (n, frames, heads, width, rotary_heads, interleaved)
        _native.call("qk_norm_rope_fwd", qkv.dtype, *tensors, *sizes, *strides, eps)
    else:
        tile, tensors = _tile(heads, width), (qkv, cos, sin, q_weight, k_weight, q, k)
        constants = {"ROTARY": rotary_heads, "INTERLEAVED": interleaved and cos is not None}
        grid = (n * ceil_div(frames * heads, tile["ROWS"]), 2, 1)
        launch(_qk_norm_rope_fwd_kernel, grid, tensors, (frames,), strides, eps, **constants, **tile)
    return q, k


def _float(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.float()


def _gradients(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, interleaved, rotary_heads, eps):
    n, heads, frames, width = dq.shape
    dweight = None if qkv is None else dq.new_empty((2, width), dtype=torch.float32)
    return dq.new_empty((n, frames, 3 * heads * width)), dweight


def _backward(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, interleaved, rotary_heads, eps):
    """Return dqkv (N, T, 3 D) and the weights' gradients (2, E) fp32. Without a norm qkv and these are None."""
    n, heads, frames, width = dq.shape
    gradients = tuple(map(unit_stride, (dq, dk, dv)))
    dqkv, norm = dq.new_empty((n, frames, 3 * heads * width)), qkv is not None
    strides = [stride for gradient in gradients for stride in gradient.stride()[:3]]
    strides += qkv.stride()[:2] if norm else (0, 0)
    if backend_of(dq) == "native":
        chunk = max(1, 16 // heads)  # frames: about 16 heads in a row, since long sums in fp32 lose accuracy
        dweight = dq.new_empty((n * ceil_div(frames, chunk) if norm else 0, 2, width), dtype=torch.float32)
        tensors = (*gradients, qkv, cos, sin, _float(q_weight), _float(k_weight), dqkv, dweight)
        sizes = (n, frames, heads, width, rotary_heads, interleaved, chunk)
        _native.call("qk_norm_rope_bwd", dq.dtype, *tensors, *sizes, *strides, eps)
    else:
        tile, steps = _tile(heads, width), 8 if norm else 1
        pieces = n * ceil_div(frames * heads, tile["ROWS"] * steps)
        dweight = dq.new_empty((pieces if norm else 0, 2, width), dtype=torch.float32)
        tensors = (*gradients, qkv, cos, sin, q_weight, k_weight, dqkv, dweight)
        constants = {"ROTARY": rotary_heads, "STEPS": steps, "INTERLEAVED": interleaved and cos is not None}
        launch(_qk_norm_rope_bwd_kernel, (pieces, 3, 1), tensors, (frames,), strides, eps, **constants, **tile)
    return dqkv, dweight.sum(0) if norm else None


_OPTIONS = "Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, bool interleaved, int rotary_heads, float eps"
_qk_norm_rope = Operation(f"qk_norm_rope(Tensor qkv, int heads, {_OPTIONS}) -> (Tensor, Tensor)", _forward, _outputs)
_qk_norm_rope_backward = Operation(
    f"qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, {_OPTIONS}) -> (Tensor, Tensor)",
    _backward,
    _gradients,
)


def _joint(qkv, heads, cos, sin, q_weight, k_weight, *options) -> tuple[torch.Tensor, ...]:
    q, k = _qk_norm_rope(qkv, heads, cos, sin, q_weight, k_weight, *options)
    v = qkv.unflatten(-1, (3, heads, -1))[:, :, 2]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _QkNormRope(torch.autograd.Function):
    """Joins both operations for autograd. Operation.differentiate cannot: an operator may not return v, a view of its
    input, and the three gradients fill one packed tensor."""

    @staticmethod
    def forward(ctx, qkv, heads, cos, sin, q_weight, k_weight, *options):
        ctx.save_for_backward(None if q_weight is None else qkv, cos, sin, q_weight, k_weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _joint(qkv, heads, cos, sin, q_weight, k_weight, *options)

    @staticmethod
    @once_differentiable("qk_norm_rope")
    def backward(ctx, *gradients):
        qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
        some = next((gradient for gradient in gradients if gradient is not None), None)
        if some is None:
            return (None,) * 9
        zeros = some.new_zeros(some.shape[-1:]).expand(some.shape)
        gradients = [zeros if gradient is None else gradient for gradient in gradients]
        dqkv, dweight = _qk_norm_rope_backward(*gradients, qkv, cos, sin, q_weight, k_weight, *ctx.options)
        if qkv is None:
            return dqkv, *(None,) * 8
        return dqkv, None, None, None, dweight[0].to(q_weight.dtype), dweight[1].to(k_weight.dtype), None, None, None


def qk_norm_rope(
    qkv: torch.Tensor,
    heads: int,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    interleaved: bool = True,
    rotary_heads: int | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v (N, H, T, E) in qkv's dtype, given qkv (N, T, 3 D).

    `rope` is (cos, sin), without gradients; with None nothing is rotated. Without weights there is no norm.
    rotary_heads rotates the first n heads only. Raises ValueError with the wanted shape, device or stride if a tensor
    does not fit.
    """
    check_rows("qkv", qkv)
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f"qkv is {qkv.shape[-1]} wide: not three times a multiple of {heads} heads")
    width = qkv.shape[-1] // (3 * heads)
    rotary_heads = heads if rotary_heads is None else rotary_heads
    if not 0 <= rotary_heads <= heads:
        raise ValueError(f"rotary_heads is {rotary_heads}, wanted 0 to {heads}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together: one of them is missing")
    if q_weight is not None:
        check_tensor("q_weight", q_weight, (width,), qkv)
        check_tensor("k_weight", k_weight, (width,), qkv)
    if rope is not None:
        if width % 2:
            raise ValueError(f"heads are {width} wide: rotary positions need an even width")
        for name, table in zip(("cos", "sin"), rope, strict=True):
            check_tensor(f"rotary table {name}", table, (qkv.shape[1], width // 2), qkv)
    if backend_of(qkv) == "reference" or (rope is None and q_weight is None):  # then all three are views
        if q_weight is not None:
            q_weight, k_weight = q_weight.to(qkv.dtype), k_weight.to(qkv.dtype)
        options = {"interleaved": interleaved, "rotary_heads": rotary_heads, "eps": eps}
        return qk_norm_rope_ref(qkv, heads, rope, q_weight=q_weight, k_weight=k_weight, **options)
    cos, sin = (None, None) if rope is None else (table.float().contiguous() for table in rope)
    inputs = (qkv, heads, cos, sin, q_weight, k_weight, interleaved, rotary_heads, float(eps))
    return _QkNormRope.apply(*inputs) if wants_gradient(inputs) else _joint(*inputs)
