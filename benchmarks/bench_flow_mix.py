"""Noised mel (100 bins, fp32 as in training) and its velocity target, noise drawn in place. Options: --help."""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels import flow_mix
from agrepa_fast.kernels.flow_mix import flow_mix_ref

MELS = 100


def make_inputs(d, t, b, dtype, device):
    return {
        "x": torch.randn(b, t, MELS, dtype=dtype, device=device),
        "t": torch.rand(b, device=device),
        "keys": torch.randint(2**62, (b,), device=device),
    }


OP = Op(
    "flow_mix",
    make_inputs,
    flow_mix,
    flow_mix_ref,
    leaves=(),
    traffic=lambda d, t, b: (3 * b * t * MELS, 0),
    dtype=torch.float32,
)

if __name__ == "__main__":
    bench_op([OP], __doc__)
