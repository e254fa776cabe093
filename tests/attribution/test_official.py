"""The released AG-REPA's definitions against values computed by hand (arXiv 2603.01006, code at 8c1371a)."""

import math

import numpy as np
import pytest
import torch

from agrepa_fast.attribution.foga import ProbeBatch, foga
from agrepa_fast.audio.mel import LogMel, frame_count
from agrepa_fast.config import DataConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.kernels import flow_mix, philox_normal
from agrepa_fast.models.audio_dit.conditioning import interpolate_tokens, sinusoids

from ..testing import small_batch, small_model


def test_path_scales_the_noise_by_one_half():
    """noise = 0.5 randn, x_t = (1 - t) noise + t x, v = x - noise."""
    sigma, key = load_config("agrepa-a").flow.sigma, torch.tensor([3])
    x = torch.tensor([[[2.0], [-1.0]]])
    a, b = (0.5 * philox_normal(key, 2))[0].tolist()
    x_t, target = flow_mix(x, torch.tensor([0.8]), key, sigma)
    assert x_t.flatten().tolist() == pytest.approx([0.2 * a + 1.6, 0.2 * b - 0.8])
    assert target.flatten().tolist() == pytest.approx([2 - a, -1 - b])


def test_ten_seconds_are_938_frames_of_100_mels():
    data = load_config("agrepa-a").data
    assert frame_count(round(10 * data.sample_rate), data) == 938
    assert data.n_mels == 100


def test_mel_of_a_sine_by_hand():
    """One centred frame: 1024-point Hann window (periodic), magnitude (not power), htk triangles, natural log."""
    data = DataConfig(sample_rate=24000, n_mels=100, f_max=12000.0)
    noise = 0.01 * np.random.default_rng(0).normal(size=24000)  # keeps every band above fp32's rounding of the sine
    wave = (0.3 * np.sin(2 * math.pi * 1000 * np.arange(24000) / 24000) + noise).astype(np.float32)
    frame = 40
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(1024) / 1024)
    piece = wave[frame * 256 - 512 : frame * 256 + 512].astype(np.float64) * window
    magnitude = np.abs(
        np.array([(piece * np.exp(-2j * math.pi * k * np.arange(1024) / 1024)).sum() for k in range(513)])
    )
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 12000 / 700), 102) / 2595) - 1)
    hertz = np.arange(513) * 24000 / 1024
    wanted = []
    for low, centre, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        triangle = np.maximum(0, np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)))
        wanted.append(math.log(max((triangle * magnitude).sum(), 1e-5)))
    got = LogMel(data)(wave)
    np.testing.assert_allclose(got[frame], wanted, atol=2e-3)


def test_interpolation_of_500_tokens_to_938_frames():
    """F.interpolate(mode="linear", align_corners=False): source place (i + 0.5) * 500 / 938 - 0.5."""
    ramp = torch.arange(500.0).view(1, 500, 1)
    out = interpolate_tokens(ramp, torch.tensor([500]), torch.tensor([938]), 938).flatten()
    for i in (0, 1, 469, 936, 937):
        place = min(max((i + 0.5) * 500 / 938 - 0.5, 0), 499)
        assert out[i].item() == pytest.approx(place, abs=1e-3)


def test_time_embedding_is_of_unscaled_t():
    """cos | sin of t * exp(-ln(10^4) i / 512), dimension 1024."""
    assert load_config("agrepa-a").model.time_scale == 1
    out = sinusoids(torch.tensor([0.8]), 1024)[0]
    for i in (0, 100, 511):
        angle = 0.8 * math.exp(-math.log(10_000) * i / 512)
        assert out[i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert out[512 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_foga_score_of_one_clip_by_hand():
    """sqrt(mean(dv^2)) / sqrt(mean v^2) at the clean mel and t = 0.8, without padding the ratio of the norms."""
    model, (mel, condition) = small_model(depth=2, position="sinusoidal", init="release"), small_batch((37, 37))
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.out.weight, std=0.1)
        torch.nn.init.normal_(block.ffn.fc2.weight, std=0.1)
    scores = foga(model, ProbeBatch(mel, condition, torch.tensor([0, 1]), (0, 1)), recipe="official")
    with torch.no_grad():
        v = model(mel, torch.full((2,), 0.8), condition).v
        model.blocks = model.blocks[1:]
        without_first = model(mel, torch.full((2,), 0.8), condition).v
    wanted = (without_first - v).square().mean((1, 2)).sqrt() / v.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(scores.values[0, :, 0, 0], wanted, atol=1e-5, rtol=1e-5)
