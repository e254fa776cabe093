import pytest
import torch

from agrepa_fast.kernels import force_backend
from agrepa_fast.kernels._sums import finish_sums

from .accuracy import DEVICE, fused_backends, guarded


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("planes", [None, 3])
def test_adds_repeats_and_chunks_and_rounds_once(planes, dtype, backend):
    """More chunks and columns than a program takes at a time; NaN around the sums must not be read."""
    torch.manual_seed(0)
    sums = guarded(torch.randn(planes or 1, 6, 130, 70, device=DEVICE))
    wanted = sums.double().unflatten(1, (3, 2)).sum((1, 3))
    with force_backend(backend):
        got = finish_sums(sums if planes else sums[0], torch.empty(2, 70, dtype=dtype, device=DEVICE), planes)
    torch.testing.assert_close(got, (wanted if planes else wanted[0]).to(dtype), rtol=1e-5, atol=1e-4)


def test_gradients_of_a_bias_and_of_modulations_per_frame():
    sums = torch.randn(1, 9, 8)
    torch.testing.assert_close(finish_sums(sums, torch.empty(8)), sums[0].sum(0))
    per_frame = torch.randn(3, 4, 5, 8)  # 4 rows over 2 conditions
    wanted = per_frame[:, :2] + per_frame[:, 2:]
    torch.testing.assert_close(finish_sums(per_frame, torch.empty(2, 5, 8), 3), wanted)
