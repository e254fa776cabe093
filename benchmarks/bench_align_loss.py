"""Alignment loss of three layers to a 1280-wide teacher, pooled and frame-wise. Options: --help.

Pooled runs in fp32, as in training; frame-wise, hidden states and heads have the run's precision. Both are the weighted
sum of the rows' losses, whose forward finishes the gradients. align_loss_rows is the loss per row.
"""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels.align_loss import align_loss, align_loss_ref, align_loss_sum

LAYERS, TEACHER = 3, 1280


def make_inputs(d, t, b, dtype, device, frames=False):
    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, device=device)).to(dtype)

    times = (t,) if frames else ()
    return {
        "hidden": draw(LAYERS, b, *times, d),
        "w1": draw(LAYERS, d, d, scale=d**-0.5),
        "b1": draw(LAYERS, d),
        "w2": draw(LAYERS, TEACHER, d, scale=d**-0.5),
        "b2": draw(LAYERS, TEACHER),
        "teacher": draw(b, *times, TEACHER).float(),
        "weights": torch.full((LAYERS,), 1 / LAYERS, device=device),
        "mask": torch.ones(b, dtype=torch.bool, device=device),
        "row_weights": torch.full((b,), 1 / b, device=device),
    }


def _rows(hidden, w1, b1, w2, b2, teacher, weights, mask, row_weights):
    return align_loss(hidden, w1, b1, w2, b2, teacher, weights, mask)


def _rows_reference(hidden, w1, b1, w2, b2, teacher, weights, mask, row_weights):
    """Return the losses in the operation's dtypes: products in the heads' precision, the cosine at least in fp32."""
    wide = torch.promote_types(w1.dtype, torch.float32)
    return align_loss_ref(hidden.to(w1.dtype), w1, b1, w2, b2, teacher.to(wide), weights, mask)


def _sum_reference(row_weights, **others):
    losses = _rows_reference(row_weights=row_weights, **others)
    return (row_weights * losses).sum(), losses.detach()


def _op(name: str, fused, reference, frames: bool) -> Op:
    def rows(t, b):
        return b * (t if frames else 1)

    def traffic(d, t, b):
        """The forward reads weights, states and teacher and writes gradients; the backward scales the gradients."""
        weights, states = LAYERS * (d * d + TEACHER * d), LAYERS * rows(t, b) * d
        return 2 * (weights + states) + rows(t, b) * TEACHER, 2 * (weights + states)

    return Op(
        name,
        lambda *sizes: make_inputs(*sizes, frames=frames),
        fused,
        reference,
        leaves=("hidden", "w1", "b1", "w2", "b2"),
        traffic=traffic,
        dtype=None if frames else torch.float32,
    )


OP = _op("align_loss", align_loss_sum, _sum_reference, frames=False)
FRAMES = _op("align_loss_frames", align_loss_sum, _sum_reference, frames=True)
ROWS = _op("align_loss_rows", _rows, _rows_reference, frames=True)

if __name__ == "__main__":
    bench_op([OP, FRAMES, ROWS], __doc__)
