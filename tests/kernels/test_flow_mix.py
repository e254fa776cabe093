import math

import pytest
import torch

from agrepa_fast.kernels import flow_mix, force_backend, philox_normal, philox_uniform
from agrepa_fast.kernels.flow_mix import _philox, _uniform

from .accuracy import DEVICE, assert_repeatable, fused_backends, rms, run

# (C, T, M), per frame, dtype
CASES = [
    ((1, 1, 1), False, torch.float32),  # one element: one normal of four
    # clips beyond two tiles of 2048 elements and no multiple of four; frames across the native tiles of 1024
    ((2, 53, 97), False, torch.float32),
    ((2, 53, 97), True, torch.float32),
    ((2, 53, 97), True, torch.bfloat16),
    ((3, 5, 3), True, torch.bfloat16),  # clips shorter than a tile, bins narrower than a counter's four normals
]
KEYS = torch.tensor([-1, 2**62 + 12345, 0x0123456789ABCDEF])  # high words and a sign


def inputs(clips, frames, bins, dtype, per_frame):
    torch.manual_seed(0)
    x = torch.randn(clips, frames, bins, device=DEVICE).to(dtype)
    t = torch.rand(*((clips, frames) if per_frame else (clips,)), device=DEVICE)
    return {"x": x}, t, [torch.randn(clips, frames, bins, device=DEVICE) for _ in range(2)]


def exact_normals(keys, count):
    """The Box-Muller transform of the same uniforms in float64."""
    u = [_uniform(words).double() for words in _philox(keys, (count + 3) // 4)]
    normals = []
    for first, second in (u[:2], u[2:]):
        radius = first.clamp(min=1e-7).log().mul(-2).sqrt()
        normals += [radius * (2 * math.pi * second).cos(), radius * (2 * math.pi * second).sin()]
    return torch.stack(normals, dim=-1).flatten(1)[:, :count]


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(("shape", "per_frame", "dtype"), CASES, ids=str)
def test_as_accurate_as_the_reference(shape, per_frame, dtype, backend):
    """Against float64 from the uniforms on: the reference's own normals are fp32."""
    tensors, t, gradients = inputs(*shape, dtype, per_frame)
    keys = KEYS[: shape[0]].to(DEVICE)
    fused, plain = (run(lambda x: flow_mix(x, t, keys, 0.7), tensors, gradients, b) for b in (backend, "reference"))
    x, dx_t, dtarget = (v.double() for v in (tensors["x"], *(g.to(dtype) for g in gradients)))
    noise = 0.7 * exact_normals(keys, x[0].numel()).view(shape)
    time = t.double().view(*t.shape, *[1] * (3 - t.ndim))
    exact = {"output 0": (1 - time) * noise + time * x, "output 1": x - noise, "dx": time * dx_t + dtarget}
    assert fused.keys() == plain.keys() == exact.keys()
    for name, value in exact.items():
        assert fused[name].dtype == plain[name].dtype == dtype
        allowed = 1.5 * rms(plain[name] - value) + 1e-7 * rms(value)
        assert rms(fused[name] - value) <= allowed, name


@pytest.mark.parametrize("backend", fused_backends())
def test_noise_is_the_reference_noise(backend):
    keys = torch.cat((KEYS, torch.arange(3, device=KEYS.device))).to(DEVICE)
    with force_backend(backend):
        noise, negative = flow_mix(torch.zeros(6, 90, 101, device=DEVICE), torch.zeros(6, device=DEVICE), keys)
    torch.testing.assert_close(noise.flatten(1), philox_normal(keys, 9090), rtol=0, atol=3e-6)
    assert torch.equal(noise, -negative)


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend):
    tensors, t, gradients = inputs(2, 53, 97, torch.float32, True)
    assert_repeatable(lambda x: flow_mix(x, t, KEYS[:2].to(DEVICE)), tensors, gradients, backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_any_strides(backend):
    """Clips that are not packed are copied; times are read by their strides."""
    tensors, t, _ = inputs(3, 6, 10, torch.float32, True)
    strided = tensors["x"][:, :4, 5:], t.t().contiguous().t()[:, :4], KEYS.to(DEVICE)
    with force_backend(backend):
        for got, wanted in zip(flow_mix(*strided), flow_mix(*(v.contiguous() for v in strided)), strict=True):
            assert torch.equal(got, wanted)


def test_philox_known_answer():
    """Random123's known answer for philox4x32-10: counter 0, key 0."""
    words = [int(w[0, 0]) for w in _philox(torch.tensor([0]), 1)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


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


@pytest.mark.parametrize("backend", [*fused_backends(), "reference"])
def test_noise_of_a_clip_depends_on_its_key_alone(backend):
    x = torch.zeros(3, 10, 4, device=DEVICE)
    keys = torch.tensor([5, 6, 7], device=DEVICE)
    t = torch.zeros(3, device=DEVICE)
    with force_backend(backend):
        alone, _ = flow_mix(x[:1], t[:1], keys[1:2])
        batch, _ = flow_mix(x, t, keys)
        padded, _ = flow_mix(torch.zeros(3, 17, 4, device=DEVICE), t, keys)
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


def test_reference_gradients():
    x, t = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.rand(2, 3)
    assert torch.autograd.gradcheck(lambda x: flow_mix(x, t, KEYS[:2]), (x,))


@pytest.mark.parametrize("per_frame", [False, True])
def test_registered_correctly(per_frame):
    x = torch.randn(2, 3, 4, requires_grad=True)
    arguments = (x, torch.rand(2, 3) if per_frame else torch.rand(2), torch.arange(2), 0.5)
    torch.library.opcheck(torch.ops.agrepa.flow_mix.default, arguments)


@pytest.mark.parametrize(
    ("x", "t", "keys", "message"),
    [
        (torch.randn(2, 3, 4), torch.rand(3), torch.arange(2), r"t is \(3,\) on cpu, wanted \(2,\) or \(2, 3\)"),
        (torch.randn(2, 3, 4), torch.rand(2, 4), torch.arange(2), r"t is \(2, 4\)"),
        (torch.randn(2, 3, 4), torch.rand(2), torch.arange(3), r"keys is \(3,\), wanted \(2,\)"),
        (torch.randn(2, 3, 4), torch.rand(2), torch.arange(2).int(), "keys are torch.int32, wanted torch.int64"),
        (torch.ones(2, 3, 4).long(), torch.rand(2), torch.arange(2), "x is torch.int64, wanted float32"),
        (torch.randn(2, 3), torch.rand(2), torch.arange(2), r"x is \(2, 3\), wanted \(N, T, D\)"),
    ],
)
def test_says_what_was_wanted(x, t, keys, message):
    with pytest.raises(ValueError, match=message):
        flow_mix(x, t, keys)
