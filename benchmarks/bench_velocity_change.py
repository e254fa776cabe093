"""FoG-A's score: relative change of 24 variants' velocities (100 mel bins) against the base. Options: --help."""

import torch
from _bench import Op, bench_op

from agrepa_fast.kernels import velocity_change
from agrepa_fast.kernels.velocity_change import velocity_change_ref

VARIANTS, MELS = 24, 100


def make_inputs(d, t, b, dtype, device):
    base = torch.randn(b, t, MELS, device=device)
    return {
        "variants": (base + 0.1 * torch.randn(VARIANTS, b, t, MELS, device=device)).to(dtype),
        "base": base.to(dtype),
        "lengths": torch.full((b,), t, device=device),
    }


def _reference(variants, base, lengths):
    """Return the change computed in fp32, as the public function does, or in float64 for float64."""
    if variants.dtype == torch.float64:
        return velocity_change_ref(variants, base, lengths)
    return velocity_change_ref(variants.float(), base.float(), lengths)


OP = Op(
    "velocity_change",
    make_inputs,
    velocity_change,
    _reference,
    leaves=(),
    traffic=lambda d, t, b: ((VARIANTS + 1) * b * t * MELS, 0),
)

if __name__ == "__main__":
    bench_op([OP], __doc__)
