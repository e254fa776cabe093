"""Teacher-projection cosine loss of all aligned layers of one domain: loss_n = sum_k lambda_k (1 - cos(mlp_k(h_kn),
y_n)), of the time-mean h_kn of each clip.

AG-REPA (arXiv 2603.01006), sec. "AG-REPA". frame_loss.py is the loss of single frames.

Dims:     K aligned layers, N rows, D width, H hidden width of the heads, E teacher width.
Shapes:   hidden (K, N, D); w1 (K, H, D), b1 (K, H), w2 (K, E, H), b2 (K, E); teacher (N, E), any row stride; weights
          (K,) or (K, N); mask (N,) bool; loss (N,) fp32.
Numerics: GEMMs in the heads' dtype, even under autocast; GELU, cosine and its gradient in fp32; gradients of the heads
          summed over chunks in fp32; no atomics, deterministic. Rows with mask False give exactly 0 and no gradient,
          even if hidden states or teacher are not finite there.
Traffic:  chunks of 4096 projected rows, which stay in the GPU's L2: two GEMMs, one pass that turns the projection
          into its own gradient, then the chunk's gradients.

Training calls align_loss_sum: it knows the rows' weights in the scalar loss, so the forward finishes the gradients.
align_loss is exact for any gradient of its rows, and computes the chunks again in its backward.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import _native
from ._backend import backend_of, tl, triton
from ._launch import TILES, UNSPECIALIZED, launch, tile_settings
from ._library import Operation, once_differentiable
from ._rows import CHUNK, ceil_div, check_tensor
from ._tiles import store_sums
from .linear_gelu import gelu_rows, gelu_rows_backward

PROJECTED = 4096  # rows projected at a time, of all heads together
_TEACHERS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of teacher_row in csrc/cpu/align_loss.cpp


def _heads(
    hidden: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    inner = F.gelu(torch.baddbmm(b1.unsqueeze(1), hidden, w1.transpose(1, 2)))
    return torch.baddbmm(b2.unsqueeze(1), inner, w2.transpose(1, 2))


def align_loss_ref(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    valid = mask.unsqueeze(-1)
    # Masking the loss alone would not do: 0 times a value that is not finite would reach the gradients as NaN.
    hidden, teacher = torch.where(valid, hidden, 0), torch.where(valid, teacher, 0)
    distance = 1 - F.cosine_similarity(_heads(hidden, w1, b1, w2, b2), teacher.unsqueeze(0), dim=-1)
    return (weights.view(len(weights), -1) * torch.where(mask, distance, 0)).sum(0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _cosine_kernel(
    z_ptr,  # (K, rows, E) contiguous; becomes its gradient
    bias_ptr,  # (K, E)
    teacher_ptr,  # (N, T, E)
    limits_ptr,  # (N,) int64
    coefficient_ptr,  # (K, N) fp32, or None: no gradient
    distance_ptr,  # (K, N * T) fp32
    dbias_ptr,  # (K, chunks, E) fp32 sums over CHUNK rows, empty without gradient
    first,
    rows,
    clips,
    frames,
    teacher_n,
    teacher_t,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(rows, CHUNK)
    k = (tl.program_id(0) // chunks).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = (d < D)[None, :]
    bias = tl.load(bias_ptr + k * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        i = tl.program_id(0) % chunks * CHUNK + start + tl.arange(0, ROWS).to(tl.int64)
        exists = i < rows
        n, t = (first + i) // frames, (first + i) % frames
        valid = t < tl.load(limits_ptr + n, mask=exists, other=0)
        mask = valid[:, None] & inside
        z_at = z_ptr + (k * rows + i[:, None]) * D + d[None, :]
        z = tl.where(mask, tl.load(z_at, mask=mask, other=0.0).to(tl.float32) + bias, 0.0)
        teacher_at = teacher_ptr + n[:, None] * teacher_n + t[:, None] * teacher_t + d[None, :]
        y = tl.load(teacher_at, mask=mask, other=0.0).to(tl.float32)
        z_norm = tl.sqrt(tl.sum(z * z, axis=1))
        z_scale = 1.0 / tl.maximum(z_norm, 1e-8)  # the epsilon of F.cosine_similarity
        y_scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), 1e-8)
        cosine = tl.sum(z * y, axis=1) * z_scale * y_scale
        tl.store(distance_ptr + k * clips * frames + first + i, tl.where(valid, 1.0 - cosine, 0.0), mask=exists)
        if coefficient_ptr is not None:
            scale = -z_scale * tl.load(coefficient_ptr + k * clips + n, mask=valid, other=0.0)
            along = cosine / tl.where(z_norm > 0.0, z_norm, 1.0)
            dz = scale[:, None] * (y * y_scale[:, None] - z * along[:, None])
            dbias += dz
            tl.store(z_at, dz.to(z_ptr.dtype.element_ty), mask=exists[:, None] & inside)
    if coefficient_ptr is not None:
        store_sums(dbias_ptr, dbias, d, D)


def _cosine(
    z: torch.Tensor,
    bias: torch.Tensor,
    teacher: torch.Tensor,
    limits: torch.Tensor,
    coefficient: torch.Tensor | None,
    distance: torch.Tensor,
    first: int,
) -> torch.Tensor | None:
    """Write the distances of the rows z + bias (K, rows, E) to frames first, first + 1, ... of the teacher (N, T, E) to
    distance (K, N T). With coefficient (K, N), z becomes the gradient of sum(coefficient distance), and the sums of it
    over rows (K, E) are returned."""
    heads, rows, width = z.shape
    native, gradient = backend_of(z) == "native", coefficient is not None
    chunk = CHUNK if native else TILES["cosine"].chunk
    chunks = ceil_div(rows, chunk)
    dbias = z.new_empty((heads, chunks if gradient else 0, width), dtype=torch.float32)
    tensors, sizes, strides = (
        (z, bias, teacher, limits, coefficient, distance, dbias),
        (first, rows, *teacher.shape[:2]),
        teacher.stride()[:2],
    )
    if native:
        kind = _TEACHERS.index(teacher.dtype)
        _native.call("align_cosine", z.dtype, *tensors, *sizes, *strides, heads, width, chunk, kind, gradient)
    else:
        settings = tile_settings("cosine", width)
        launch(_cosine_kernel, (heads * chunks, 1, 1), tensors, sizes, strides, CHUNK=chunk, **settings)
    return dbias.sum(1) if gradient else None


def _pieces(heads: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield the heads and rows to project at a time: PROJECTED rows of one head, or fewer rows of several heads."""
    together = max(1, PROJECTED // max(rows, 1))
    for k in range(0, heads, together):
        for row in range(0, rows, PROJECTED):
            yield slice(k, k + together), slice(row, min(row + PROJECTED, rows))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right to total (fp32)."""
    if left.dtype == total.dtype:
        total.baddbmm_(left.mT, right)
    else:
        total += torch.bmm(left.mT, right)


def _compute(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    row_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return the losses of the rows; with row_weights also the gradients of their weighted sum, to hidden, w1, b1, w2
    and b2."""
    heads, clips, _ = hidden.shape
    b1, b2 = b1.contiguous(), b2.contiguous()
    teacher, limits, valid = teacher.unsqueeze(1), mask.long(), mask.unsqueeze(-1)
    distance = hidden.new_empty((heads, clips), dtype=torch.float32)
    gradients, coefficient = [], None
    if row_weights is not None:
        coefficient = weights.float().view(heads, -1) * row_weights.float()
        sums = [p.new_zeros(p.shape, dtype=torch.float32) for p in (w1, b1, w2, b2)]
        gradients = [hidden.new_empty(hidden.shape), *sums]
    with torch.autocast(hidden.device.type, enabled=False):
        for k, rows in _pieces(heads, clips):
            h = torch.where(valid[rows], hidden[k, rows], 0).to(w1.dtype)
            pre = torch.bmm(h, w1[k].mT)
            inner = pre.new_empty(pre.shape)
            gelu_rows(pre, b1[k], False, inner)
            z = torch.bmm(inner, w2[k].mT)
            of_heads = None if coefficient is None else coefficient[k]
            db2 = _cosine(z, b2[k], teacher, limits, of_heads, distance[k], rows.start)
            if coefficient is None:
                continue
            dhidden, dw1, db1, dw2 = gradients[0], gradients[1][k], gradients[2][k], gradients[3][k]
            gradients[4][k] += db2
            _add_product(dw2, z, inner)
            dpre = torch.bmm(z, w2[k])
            db1 += gelu_rows_backward(dpre, pre, b1[k], False, dpre).sum(1)
            _add_product(dw1, dpre, h)
            dhidden[k, rows] = torch.bmm(dpre, w1[k])
    losses = (weights.float().view(heads, -1) * distance).sum(0)
    if coefficient is None:
        return (losses,)
    dhidden, *sums = gradients
    return losses, dhidden, *(s.to(w1.dtype) for s in sums)


def _losses(hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return _compute(hidden, *others, None)[0]


def _losses_fake(hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[1], dtype=torch.float32)


def _total(hidden: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    losses, *gradients = _compute(hidden, *others)
    return (others[-1].float() * losses).sum(), losses, *gradients


def _total_fake(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *others: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    losses = _losses_fake(hidden)
    return losses.new_empty(()), losses, *(x.new_empty(x.shape) for x in (hidden, w1, b1, w2, b2))


_INPUTS = "Tensor hidden, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor teacher, Tensor weights, Tensor mask"
_align_loss = Operation(f"align_loss({_INPUTS}) -> Tensor", _losses, _losses_fake)
_align_loss_sum = Operation(
    f"align_loss_sum({_INPUTS}, Tensor row_weights) -> "
    "(Tensor total, Tensor losses, Tensor dhidden, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    _total,
    _total_fake,
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable("align_loss")
def _differentiate(ctx, dlosses) -> tuple[torch.Tensor | None, ...]:
    _, _, *gradients = _align_loss_sum(*ctx.saved_tensors, dlosses)
    return *gradients, None, None, None


def _save_gradients(ctx, inputs, output) -> None:
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*others[1:])


@once_differentiable("align_loss_sum")
def _scale_gradients(ctx, dtotal, *_) -> tuple[torch.Tensor | None, ...]:
    if dtotal is None:
        return (None,) * 9
    return *(dtotal * gradient for gradient in ctx.saved_tensors), None, None, None, None


_align_loss.differentiate(_differentiate, _save)
_align_loss_sum.differentiate(_scale_gradients, _save_gradients)


def _check(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    if hidden.ndim != 3 or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} {tuple(hidden.shape)}, wanted floating point (K, N, D)")
    heads, clips, width = hidden.shape
    if teacher.shape[:-1] != (clips,) or not teacher.is_floating_point():
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and teacher {tuple(teacher.shape)} ({teacher.dtype}) must share rows and "
            "be floating point"
        )
    check_tensor("teacher", teacher, (*teacher.shape,), hidden)
    check_tensor("w1", w1, (heads, "H", width), hidden)
    check_tensor("b1", b1, (heads, w1.shape[1]), hidden)
    check_tensor("w2", w2, (heads, teacher.shape[-1], w1.shape[1]), hidden)
    check_tensor("b2", b2, (heads, teacher.shape[-1]), hidden)
    check_tensor("weights", weights, (heads,) if weights.ndim == 1 else (heads, clips), hidden)
    check_tensor("mask", mask, (clips,), hidden)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, wanted torch.bool")
    for name, p in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if p.dtype != w1.dtype or p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"{name} is {p.dtype}, wanted float32, bfloat16 or float64, the same for all of the heads")


def _reference(hidden: torch.Tensor, w1: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Return align_loss_ref in the operation's dtypes: GEMMs in the heads' dtype, the cosine at least in fp32."""
    b1, w2, b2, teacher, *rest = others
    wide = torch.promote_types(w1.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return align_loss_ref(hidden.to(w1.dtype), w1, b1, w2, b2, teacher.to(wide), *rest)


def align_loss(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the loss per row (N,), fp32. Hidden states and heads get gradients, teacher and weights do not.

    Raises ValueError with the wanted shape, device, stride or dtype if a tensor does not fit.
    """
    _check(hidden, w1, b1, w2, b2, teacher, weights, mask)
    teacher, weights = teacher.detach(), weights.detach()
    if backend_of(w1) == "reference":
        return _reference(hidden, w1, b1, w2, b2, teacher, weights, mask)
    teacher = teacher if teacher.dtype in _TEACHERS else teacher.float()
    return _align_loss(hidden, w1, b1, w2, b2, teacher, weights, mask)


def align_loss_sum(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    row_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum(row_weights * loss), fp32, and the losses (N,) detached.

    The gradients are computed here and only scaled in the backward. They and the errors are those of align_loss;
    row_weights (N,) gets no gradient.
    """
    _check(hidden, w1, b1, w2, b2, teacher, weights, mask)
    check_tensor("row_weights", row_weights, (hidden.shape[1],), hidden)
    row_weights = row_weights.detach()
    if backend_of(w1) == "reference" or not torch.is_grad_enabled():
        losses = align_loss(hidden, w1, b1, w2, b2, teacher, weights, mask)
        return (row_weights * losses).sum(), losses.detach()
    teacher = teacher.detach() if teacher.dtype in _TEACHERS else teacher.detach().float()
    total, losses, *_ = _align_loss_sum(hidden, w1, b1, w2, b2, teacher, weights.detach(), mask, row_weights)
    return total, losses
