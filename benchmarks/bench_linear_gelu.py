"""Linear with bias and GELU, exact and tanh: the first FFN layer, d to 4 d. Options: --help."""

from functools import partial

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels import linear_gelu
from agrepa_fast.kernels.linear_gelu import linear_gelu_ref


def make_inputs(d, t, b, dtype, device):
    return {
        "x": torch.randn(b, t, d, dtype=dtype, device=device),
        "weight": torch.randn(4 * d, d, dtype=dtype, device=device) / d**0.5,
        "bias": torch.randn(4 * d, dtype=dtype, device=device),
    }


def _traffic(d, t, b):
    """Forward x, W -> y; backward dy, the input of the GELU, x, W -> dx, dW."""
    rows, weight = b * t, 4 * d * d
    return rows * 5 * d + weight, rows * 10 * d + 2 * weight


def _op(name: str, gelu: str) -> Op:
    return Op(
        name,
        make_inputs,
        partial(linear_gelu, gelu=gelu),
        partial(linear_gelu_ref, gelu=gelu),
        leaves=("x", "weight", "bias"),
        traffic=_traffic,
        flops=lambda d, t, b: (8 * b * t * d * d, 16 * b * t * d * d),
    )


OP, TANH = _op("linear_gelu", "erf"), _op("linear_gelu_tanh", "tanh")

if __name__ == "__main__":
    bench_op([OP, TANH], __doc__)
