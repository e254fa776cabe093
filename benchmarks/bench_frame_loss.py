"""Frame-wise alignment loss of one layer to a 1280-wide teacher: REPA's three layers, iREPA's convolution. Options:
--help. Hidden states and heads have the run's precision, as in training."""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels.frame_loss import frame_loss_ref, frame_loss_sum

TEACHER = 1280


def make_inputs(d, t, b, dtype, device, context):
    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, device=device)).to(dtype)

    widths = [(2 * context + 1) * d, *([] if context else [2 * d, 2 * d]), TEACHER]
    tensors = {"hidden": draw(b, t, d), "teacher": draw(b, t, TEACHER).float()}
    for number in range(len(widths) - 1):
        inputs, outputs = widths[number : number + 2]
        tensors |= {f"w{number}": draw(outputs, inputs, scale=inputs**-0.5), f"b{number}": draw(outputs)}
    lengths = torch.full((b,), t, device=device)
    return tensors | {"lengths": lengths, "row_weights": torch.full((b,), 1 / b, device=device)}


def _layers(parts):
    return [(parts[f"w{number}"], parts[f"b{number}"]) for number in range(len(parts) // 2)]


def _op(name: str, context: int) -> Op:
    def fused(hidden, teacher, lengths, row_weights, **parts):
        return frame_loss_sum(hidden, teacher, lengths, row_weights, _layers(parts), context)

    def plain(hidden, teacher, lengths, row_weights, **parts):
        dtype = parts["w0"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        losses = frame_loss_ref(hidden.to(dtype), teacher.to(wide), lengths, _layers(parts), context)
        return (row_weights * losses).sum(), losses.detach()

    def traffic(d, t, b):
        """The forward reads weights, states and teacher and writes gradients; the backward scales the gradients."""
        weights = 3 * d * TEACHER if context else 2 * d * d + 4 * d * d + 2 * d * TEACHER
        return 2 * (weights + b * t * d) + b * t * TEACHER, 2 * (weights + b * t * d)

    parts = ("w0", "b0") if context else ("w0", "b0", "w1", "b1", "w2", "b2")
    return Op(name, lambda *sizes: make_inputs(*sizes, context), fused, plain, ("hidden", *parts), traffic)


OPS = [_op("frame_loss", 0), _op("frame_loss_conv", 1)]

if __name__ == "__main__":
    bench_op(OPS, __doc__)
