"""Frame-wise teacher-projection cosine loss of one layer through a deep or convolutional head: loss_n = mean over the
clip's frames of 1 - cos(head(h_n), y_n), head = linear layers with SiLU between them.

REPA (Yu et al. 2025): three linear layers. iREPA (arXiv 2512.10794): one convolution over 2 context + 1 frames, which
is a linear layer of [h_{t-1} | h_t | h_{t+1}], zero beyond the clip.

Dims:     N rows, T frames, D width, E teacher width, H_i hidden widths.
Shapes:   hidden (N, T, D); layers (w (H_i, H_{i-1}), b (H_i,)), the first takes (2 context + 1) D, the last gives E;
          teacher (N, T, E), any row strides; lengths, row_weights (N,); losses (N,) fp32.
Numerics: products in the heads' dtype, even under autocast; SiLU, cosine and its gradient in fp32; gradients of the
          heads summed over chunks in fp32; deterministic. Rows of length 0 and frames beyond their clip's length give
          exactly 0 and no gradient, even if hidden states or teacher are not finite there.
Traffic:  chunks of PROJECTED frames: the head's forward, one pass that turns the projection into its own gradient, the
          head's backward. Saved are gradients alone, of hidden and the head: no tensor of N T E or N T H elements.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ._backend import backend_of
from ._library import on_its_device, once_differentiable
from ._rows import check_tensor, valid_frames
from .align_loss import PROJECTED, _add_product, _cosine

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]


def frame_loss_ref(
    hidden: torch.Tensor, teacher: torch.Tensor, lengths: torch.Tensor, layers: Layers, context: int = 0
) -> torch.Tensor:
    frames = hidden.shape[1]
    valid = valid_frames(lengths, frames).unsqueeze(-1)
    # Not the losses alone: the gradient of a product with a frame that is not finite would be NaN.
    x, teacher = torch.where(valid, hidden, 0), torch.where(valid, teacher, 0)
    padded = F.pad(x, (0, 0, context, context))
    x = torch.cat([padded[:, shift : shift + frames] for shift in range(2 * context + 1)], dim=-1)
    for number, (w, b) in enumerate(layers):
        x = F.linear(F.silu(x) if number else x, w, b)
    distance = torch.where(valid.squeeze(-1), 1 - F.cosine_similarity(x, teacher, dim=-1), 0)
    return distance.sum(1) / lengths.clamp(min=1)


class _FrameLoss(torch.autograd.Function):
    """Gradients are computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, teacher, lengths, row_weights, context, *flat):
        layers = list(zip(flat[::2], flat[1::2], strict=True))
        losses, dhidden, sums = on_its_device(_compute)(hidden, teacher, lengths, row_weights, layers, context)
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dhidden, *(total.to(p.dtype) for total, p in zip(sums, flat, strict=True)))
        return (row_weights * losses).sum(), losses

    @staticmethod
    @once_differentiable("frame_loss_sum")
    def backward(ctx, dtotal, _):
        if dtotal is None:
            return (None,) * (5 + len(ctx.saved_tensors) - 1)
        dhidden, *sums = (dtotal * gradient for gradient in ctx.saved_tensors)
        return dhidden, None, None, None, None, *sums


def _compute(
    hidden: torch.Tensor,
    teacher: torch.Tensor,
    lengths: torch.Tensor,
    row_weights: torch.Tensor,
    layers: Layers,
    context: int,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the losses of the rows, and the gradients of their weighted sum to hidden and to each w and b."""
    clips, frames, width = hidden.shape
    rows, dtype = clips * frames, layers[0][0].dtype
    flat, limits = hidden.reshape(rows, width), lengths.long()
    counts, valid = limits.clamp(min=1), valid_frames(limits, frames).view(-1, 1)
    inside = _inside(clips, frames, context, flat.device)
    coefficient = (row_weights.float() / counts).unsqueeze(0)
    distance = flat.new_empty((1, rows), dtype=torch.float32)
    dhidden = torch.zeros_like(flat)
    sums = [p.new_zeros(p.shape, dtype=torch.float32) for layer in layers for p in layer]
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, rows, PROJECTED):
            end = min(start + PROJECTED, rows)
            first, last = max(0, start - context), min(rows, end + context)  # with the neighbours of the chunk
            x = torch.where(valid[first:last], flat[first:last], 0).to(dtype)
            x = _neighbours(x, start - first, end - start, inside[:, start:end], context)
            inputs, before = [x], []
            for w, b in layers[:-1]:
                before.append(F.linear(inputs[-1], w, b))
                inputs.append(F.silu(before[-1].float()).to(dtype))
            w, b = layers[-1]
            z = F.linear(inputs[-1], w).unsqueeze(0)
            db = _cosine(z, b.unsqueeze(0).contiguous(), teacher, limits, coefficient, distance, start)[0]
            dz = z[0]
            for number in range(len(layers) - 1, -1, -1):
                if db is None:
                    db = dz.float().sum(0)
                _add_product(sums[2 * number].unsqueeze(0), dz.unsqueeze(0), inputs[number].unsqueeze(0))
                sums[2 * number + 1] += db
                dz, db = dz @ layers[number][0], None
                if number:
                    pre = before[number - 1].float()
                    dz = torch.ops.aten.silu_backward(dz.float(), pre).to(dtype)
            _add_to_neighbours(dhidden[first:last], dz, start - first, inside[:, start:end], context)
    dhidden.masked_fill_(~valid, 0)  # in place: it is the largest tensor here
    return distance.view(clips, frames).sum(1) / counts, dhidden.view(hidden.shape), sums


def _inside(clips: int, frames: int, context: int, device: torch.device) -> torch.Tensor:
    """Return (2 context + 1, N T, 1) bool: whether each neighbour of a frame, the earliest first, is in its row."""
    place = torch.arange(frames, device=device)
    shifted = torch.stack([place + shift for shift in range(-context, context + 1)])
    return ((shifted >= 0) & (shifted < frames)).repeat(1, clips).unsqueeze(-1)


def _neighbours(x: torch.Tensor, lead: int, rows: int, inside: torch.Tensor, context: int) -> torch.Tensor:
    """Return (rows, (2 context + 1) D): each frame of x from `lead` on between its neighbours, zero beyond its row."""
    if not context:
        return x
    padded = F.pad(x, (0, 0, context - lead, context))  # of the first and the last chunk
    shifts = range(2 * context + 1)
    return torch.cat([torch.where(inside[shift], padded[shift : shift + rows], 0) for shift in shifts], dim=1)


def _add_to_neighbours(
    total: torch.Tensor, gradient: torch.Tensor, lead: int, inside: torch.Tensor, context: int
) -> None:
    """Add the gradient of `_neighbours`'s result to total, that of x."""
    rows, width = gradient.shape[0], total.shape[1]
    padded = gradient.new_zeros((rows + 2 * context, width), dtype=torch.float32)
    for shift, part in enumerate(gradient.float().split(width, dim=1)):
        padded[shift : shift + rows] += torch.where(inside[shift], part, 0)
    skipped = context - lead
    total += padded[skipped : skipped + total.shape[0]]


def frame_loss_sum(
    hidden: torch.Tensor,
    teacher: torch.Tensor,
    lengths: torch.Tensor,
    row_weights: torch.Tensor,
    layers: Layers,
    context: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum(row_weights * losses), fp32, and the losses (N,), detached.

    hidden and layers get gradients, the others none. Raises ValueError with the wanted shape, device, stride or dtype
    if a tensor does not fit.
    """
    if hidden.ndim != 3 or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} {tuple(hidden.shape)}, wanted floating point (N, T, D)")
    clips, frames, width = hidden.shape
    check_tensor("teacher", teacher, (clips, frames, layers[-1][0].shape[0]), hidden)
    check_tensor("lengths", lengths, (clips,), hidden)
    check_tensor("row_weights", row_weights, (clips,), hidden)
    inputs = (2 * context + 1) * width
    for number, (w, b) in enumerate(layers, 1):
        check_tensor(f"w{number}", w, ("H", inputs), hidden)
        inputs = w.shape[0]
        check_tensor(f"b{number}", b, (inputs,), hidden)
        if not (w.dtype == b.dtype == layers[0][0].dtype):
            raise ValueError(f"w{number} is {w.dtype}, b{number} {b.dtype}: wanted {layers[0][0].dtype}, as w1 is")
    teacher, row_weights = teacher.detach(), row_weights.detach()
    if backend_of(layers[0][0]) == "reference" or not torch.is_grad_enabled():
        dtype = layers[0][0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            losses = frame_loss_ref(hidden.to(dtype), teacher.to(wide), lengths, layers, context)
        return (row_weights * losses).sum(), losses.detach()
    flat = [parameter for layer in layers for parameter in layer]
    return _FrameLoss.apply(hidden, teacher, lengths, row_weights, context, *flat)
