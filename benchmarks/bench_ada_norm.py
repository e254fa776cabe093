"""Adaptive layer norm: fused, torch.compile of the reference, and eager. Options: --help."""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels import ada_norm
from agrepa_fast.kernels.ada_norm import ada_norm_ref


def make_inputs(d, t, b, dtype, device):
    return {
        "x": torch.randn(b, t, d, dtype=dtype, device=device),
        "modulation": torch.randn(b, 2 * d, dtype=dtype, device=device),  # chunks of it, as in the block
    }


OP = Op(
    "ada_norm",
    make_inputs,
    lambda x, modulation: ada_norm(x, *modulation.chunk(2, dim=-1)),
    lambda x, modulation: ada_norm_ref(x, *modulation.chunk(2, dim=-1)),
    leaves=("x", "modulation"),
    traffic=lambda d, t, b: (2 * b * t * d, 3 * b * t * d),
)

if __name__ == "__main__":
    bench_op([OP], __doc__)
