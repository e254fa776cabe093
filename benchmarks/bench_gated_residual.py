"""Gated residual with the next modulated norm, without it (at a block's end), and the chain of both and ada_norm in one
block. Options: --help."""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels import ada_norm, gated_residual
from agrepa_fast.kernels.ada_norm import ada_norm_ref
from agrepa_fast.kernels.gated_residual import gated_residual_ref


def make_inputs(d, t, b, dtype, device, modulations=3):
    return {
        "h": torch.randn(b, t, d, dtype=dtype, device=device),
        "f": torch.randn(b, t, d, dtype=dtype, device=device),
        "modulation": torch.randn(b, modulations * d, dtype=dtype, device=device),
    }


def _then_norm(call):
    def run(h, f, modulation):
        gate, scale, shift = modulation.chunk(3, dim=-1)
        return tuple(call(h, f, gate, scale=scale, shift=shift)[:2])

    return run


OP = Op(
    "gated_residual",
    make_inputs,
    _then_norm(gated_residual),
    _then_norm(gated_residual_ref),
    leaves=("h", "f", "modulation"),
    traffic=lambda d, t, b: (4 * b * t * d, 6 * b * t * d),
)
END = Op(
    "gated_residual_end",
    lambda *sizes: make_inputs(*sizes, modulations=1),
    lambda h, f, modulation: gated_residual(h, f, modulation).h,
    lambda h, f, modulation: gated_residual_ref(h, f, modulation).h,
    leaves=("h", "f", "modulation"),
    traffic=lambda d, t, b: (3 * b * t * d, 4 * b * t * d),
)


def _chain(norm, residual):
    """Return everything that a block does between its matrix products; f1 and f2 are the outputs of its branches."""

    def run(x, f1, f2, modulation):
        scale1, shift1, scale2, shift2, gate1, gate2 = modulation.chunk(6, dim=-1)
        middle = residual(x, f1, gate1, scale=scale2, shift=shift2)
        return norm(x, scale1, shift1), middle.y, residual(middle.h, f2, gate2).h

    return run


def _chain_inputs(d, t, b, dtype, device):
    inputs = make_inputs(d, t, b, dtype, device, modulations=6)
    inputs["x"], inputs["f1"] = inputs.pop("h"), inputs.pop("f")
    return inputs | {"f2": torch.randn_like(inputs["x"])}


CHAIN = Op(
    "chain",
    _chain_inputs,
    _chain(ada_norm, gated_residual),
    _chain(ada_norm_ref, gated_residual_ref),
    leaves=("x", "f1", "f2", "modulation"),
    traffic=lambda d, t, b: ((2 + 4 + 3) * b * t * d, (3 + 6 + 4) * b * t * d),
)

if __name__ == "__main__":
    bench_op([OP, END, CHAIN], __doc__)
