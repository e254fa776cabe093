import math

import pytest
import torch

from agrepa_fast.kernels import qk_norm_rope
from agrepa_fast.models.conditioning import rotary_tables


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotates_each_pair_by_its_angle(interleaved):
    heads, width, frames = 2, 6, 5
    qkv = torch.randn(1, frames, 3 * heads * width, dtype=torch.float64)
    cos, sin = rotary_tables(frames, width, "cpu")
    q, k, v = qk_norm_rope(qkv, heads, (cos.double(), sin.double()), interleaved=interleaved, rotary_heads=1)
    for part, got in enumerate((q, k)):
        for frame in range(frames):
            for pair in range(width // 2):
                i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
                angle = frame * 10_000 ** (-2 * pair / width)
                a, b = (qkv[0, frame, part * heads * width + place].item() for place in (i, j))
                assert got[0, 0, frame, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
                assert got[0, 0, frame, j].item() == pytest.approx(a * math.sin(angle) + b * math.cos(angle), abs=1e-6)
    packed = qkv.view(1, frames, 3, heads, width)
    assert torch.equal(q[:, 1], packed[:, :, 0, 1])  # heads beyond the first n are left alone
    assert torch.equal(v, packed[:, :, 2].transpose(1, 2))


def test_norm_gives_unit_rms_times_weight():
    qkv = 7 * torch.randn(2, 3, 24)
    q, k, _ = qk_norm_rope(qkv, 2, q_weight=torch.full((4,), 3.0), k_weight=torch.ones(4))
    torch.testing.assert_close(q.square().mean(-1).sqrt(), torch.full((2, 2, 3), 3.0))
    torch.testing.assert_close(k.square().mean(-1).sqrt(), torch.ones(2, 2, 3))


def test_gradients():
    cos, sin = (table.double() for table in rotary_tables(3, 4, "cpu"))
    qkv = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(x, q, k):
        return qk_norm_rope(x, 2, (cos, sin), q_weight=q, k_weight=k)

    assert torch.autograd.gradcheck(call, (qkv, *weights))


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="wanted \\(3, 2\\)"):
        qk_norm_rope(torch.randn(2, 3, 24), 2, rotary_tables(4, 4, "cpu"))
    with pytest.raises(ValueError, match="5 heads"):
        qk_norm_rope(torch.randn(2, 3, 24), 5)
