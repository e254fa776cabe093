"""Per-head RMS norm and rotary positions on q and k, from the packed projection. Options: --help."""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels import qk_norm_rope
from agrepa_fast.kernels.qk_norm_rope import qk_norm_rope_ref
from agrepa_fast.models.audio_dit.conditioning import rotary_tables

HEAD = 64


def make_inputs(d, t, b, dtype, device):
    cos, sin = rotary_tables(t, HEAD, device)
    return {
        "qkv": torch.randn(b, t, 3 * d, dtype=dtype, device=device),
        "q_weight": torch.rand(HEAD, dtype=dtype, device=device) + 0.5,
        "k_weight": torch.rand(HEAD, dtype=dtype, device=device) + 0.5,
        "cos": cos,
        "sin": sin,
    }


def _with(call):
    def run(qkv, q_weight, k_weight, cos, sin):
        heads = qkv.shape[-1] // (3 * HEAD)
        return call(qkv, heads, (cos, sin), q_weight=q_weight, k_weight=k_weight)

    return run


OP = Op(
    "qk_norm_rope",
    make_inputs,
    _with(qk_norm_rope),
    _with(qk_norm_rope_ref),
    leaves=("qkv", "q_weight", "k_weight"),
    traffic=lambda d, t, b: (2 * 2 * b * t * d, 2 * 2 * b * t * d),  # q and k
)

if __name__ == "__main__":
    bench_op([OP], __doc__)
