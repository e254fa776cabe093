import pytest
import torch

from agrepa_fast.kernels import flow_mix, philox_normal, philox_uniform
from agrepa_fast.kernels.flow_mix import _philox


@pytest.mark.parametrize(
    (
        "key",
        "words",
    ),  # Random123's known answers for philox4x32-10, counter 0 (key 0) and by the same rounds in Python integers
    [(0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))],
)
def test_philox_known_answer(key, words):
    got = [int(w[0, 0]) for w in _philox(torch.tensor([key]), 1)]
    assert tuple(got) == words


def python_philox(key: int, counter: int) -> tuple[int, ...]:
    """Philox4x32-10 of Salmon et al. 2011 in unbounded integers, counter (c, 0, 0, 0)."""
    c, k = [counter, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def test_philox_with_high_key_words_and_counters():
    keys = torch.tensor([-1, 2**62 + 12345, 0x0123456789ABCDEF])
    words = torch.stack(_philox(keys, 1000), dim=-1)
    for row, key in enumerate(keys.tolist()):
        for counter in (0, 1, 999):
            assert tuple(words[row, counter].tolist()) == python_philox(key % 2**64, counter)


def test_draws_have_the_right_distribution():
    keys = torch.arange(8)
    u, n = philox_uniform(keys, 50_000), philox_normal(keys, 50_000)
    assert 0 <= u.min() <= u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert n.mean().item() == pytest.approx(0, abs=5e-3)
    assert n.std().item() == pytest.approx(1, abs=5e-3)
    assert n.pow(4).mean().item() == pytest.approx(3, abs=0.05)
    assert torch.corrcoef(n).fill_diagonal_(0).abs().max() < 0.02  # clips are independent


def test_noise_of_a_clip_depends_on_its_key_alone():
    x = torch.zeros(3, 10, 4)
    keys = torch.tensor([5, 6, 7])
    t = torch.zeros(3)
    alone, _ = flow_mix(x[:1], t[:1], keys[1:2])
    batch, _ = flow_mix(x, t, keys)
    padded, _ = flow_mix(torch.zeros(3, 17, 4), t, keys)
    assert torch.equal(batch[1], alone[0])
    assert torch.equal(padded[:, :10], batch)


def test_path_and_target():
    x, t, keys = torch.randn(2, 5, 3), torch.tensor([0.25, 1.0]), torch.tensor([1, 2])
    x_t, target = flow_mix(x, t, keys, sigma=0.5)
    noise = 0.5 * philox_normal(keys, 15).view(2, 5, 3)
    torch.testing.assert_close(x_t[0], 0.75 * noise[0] + 0.25 * x[0])
    torch.testing.assert_close(x_t[1], x[1])
    torch.testing.assert_close(target, x - noise)
    per_frame, _ = flow_mix(x, t[:, None].expand(2, 5), keys, sigma=0.5)
    assert torch.equal(per_frame, x_t)
