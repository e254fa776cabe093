"""Alignment loss of three layers' time-means to a 1280-wide teacher, in fp32 as in training. Options: --help.

align_loss is the weighted sum of the rows' losses, whose forward finishes the gradients; align_loss_rows is the loss of
each row. bench_frame_loss.py has the loss of single frames.
"""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels.align_loss import align_loss, align_loss_ref, align_loss_sum

LAYERS, TEACHER = 3, 1280


def make_inputs(d, _t, b, dtype, device):
    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, device=device)).to(dtype)

    return {
        "hidden": draw(LAYERS, b, d),
        "w1": draw(LAYERS, d, d, scale=d**-0.5),
        "b1": draw(LAYERS, d),
        "w2": draw(LAYERS, TEACHER, d, scale=d**-0.5),
        "b2": draw(LAYERS, TEACHER),
        "teacher": draw(b, TEACHER).float(),
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


def _traffic(d, _t, b):
    """The forward reads weights, states and teacher and writes gradients; the backward scales the gradients."""
    weights, states = LAYERS * (d * d + TEACHER * d), LAYERS * b * d
    return 2 * (weights + states) + b * TEACHER, 2 * (weights + states)


def _op(name: str, fused, reference) -> Op:
    leaves = ("hidden", "w1", "b1", "w2", "b2")
    return Op(name, make_inputs, fused, reference, leaves, _traffic, dtype=torch.float32)


OP = _op("align_loss", align_loss_sum, _sum_reference)
ROWS = _op("align_loss_rows", _rows, _rows_reference)

if __name__ == "__main__":
    bench_op([OP, ROWS], __doc__)
