import math
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from agrepa_fast.config import FlowConfig
from agrepa_fast.flow import (
    counted_frames,
    expected_frames,
    fixed_span,
    flow_loss,
    integrate,
    reference_around,
    reference_prefix,
    sample,
    sample_times,
    sway_times,
    training_draws,
)
from agrepa_fast.kernels import philox_normal, philox_uniform
from agrepa_fast.models.backbone import Velocity
from agrepa_fast.seeds import clip_keys

from ..attribution.test_peers import import_alone
from ..testing import small_batch


def test_euler_on_a_linear_field_lands_on_the_known_point():
    """dx/dt = -x: each Euler step multiplies by (1 - dt)."""
    times = sway_times(31, -1.0)
    wanted = math.prod(1 - float(b - a) for a, b in pairwise(times))
    landed = integrate(lambda x, t: -x, torch.tensor([3.0]), times)
    assert landed.item() == pytest.approx(3 * wanted, rel=1e-5)
    fine = integrate(lambda x, t: -x, torch.tensor([3.0]), sway_times(4000, 0.0))
    assert fine.item() == pytest.approx(3 * math.exp(-1), rel=1e-3)


def test_errors_fall_with_the_order_of_the_solver():
    """dx/dt = -2 t x: half as long steps make Euler's error half as large, and the midpoint's a quarter."""

    def error(solver: str, steps: int) -> float:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        x = integrate(lambda x, t: -2 * t * x, torch.ones(1, dtype=torch.float64), times, solver)
        return abs(float(x) - math.exp(-1))

    for solver, ratio in (("euler", 2), ("midpoint", 4)):
        assert error(solver, 64) / error(solver, 128) == pytest.approx(ratio, rel=0.05)
    assert error("midpoint", 16) < error("euler", 32) / 10  # as many velocities


def test_sway_times():
    times = sway_times(4, -1.0)
    assert times.tolist() == pytest.approx([1 - math.cos(math.pi / 2 * t / 4) for t in range(5)], abs=1e-6)
    assert sway_times(4, 0.0).tolist() == [0, 0.25, 0.5, 0.75, 1]


class _Field(torch.nn.Module):
    """A known velocity for every clip: `given` with its tokens, `free` without; moves straight, so Euler is exact."""

    def __init__(self, given, free):
        super().__init__()
        self.given, self.free, self.calls = given, free, 0

    def forward(self, x, t, condition):
        self.calls += 1
        rows = x.shape[0] // self.given.shape[0]
        kept = condition.keep_tokens[:, None, None]
        return Velocity(torch.where(kept, self.given.repeat(rows, 1, 1), self.free.repeat(rows, 1, 1)), {})


class _Decay(torch.nn.Module):
    """dx/dt = -x."""

    calls = 0

    def forward(self, x, t, condition):
        self.calls += 1
        return Velocity(-x, {})


def test_sampler_with_guidance_lands_on_the_guided_point():
    mel, condition = small_batch()
    keys = clip_keys(0, 0, range(3), "sample")
    given, free = torch.randn_like(mel), torch.randn_like(mel)
    field, flow = _Field(given, free), FlowConfig(steps=7, guidance=3.0, sigma=0.5)
    landed = sample(field, condition, keys, flow)
    start = 0.5 * philox_normal(keys, mel[0].numel()).view_as(mel)
    torch.testing.assert_close(landed, start + free + 3 * (given - free), atol=1e-4, rtol=1e-4)
    assert field.calls == 7  # both branches in one batch
    plain = sample(
        field, replace(condition, keep_tokens=torch.ones(3, dtype=torch.bool)), keys, replace(flow, guidance=1.0)
    )
    torch.testing.assert_close(plain, start + given, atol=1e-4, rtol=1e-4)


def test_frames_that_no_loss_has_taught_are_those_of_the_reference():
    mel, condition = small_batch()
    field, keys = _Field(torch.randn_like(mel), torch.randn_like(mel)), clip_keys(0, 0, range(3), "sample")
    free = sample(field, condition, keys, FlowConfig(steps=2))
    filled = sample(field, condition, keys, FlowConfig(steps=2, loss_region="hidden"))
    given = condition.reference != 0
    assert given.any()
    assert torch.equal(filled, torch.where(given, mel, free))
    assert not torch.equal(filled, free)


def test_the_sampler_takes_its_solver_from_the_settings():
    """dx/dt = -x: a midpoint step multiplies by 1 - dt + dt^2 / 2, after two velocities."""
    mel, condition = small_batch()
    keys = clip_keys(0, 0, range(3), "sample")
    start = 0.5 * philox_normal(keys, mel[0].numel()).view_as(mel)
    for solver, step, calls in (("euler", 1 - 0.25, 4), ("midpoint", 1 - 0.25 + 0.25**2 / 2, 8)):
        field = _Decay()
        landed = sample(field, condition, keys, FlowConfig(steps=4, guidance=1.0, sway=0.0, solver=solver))
        torch.testing.assert_close(landed, start * step**4, atol=1e-5, rtol=1e-5)
        assert field.calls == calls


def test_null_branch_keeps_the_reference(model):
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(args[2]))
    _, condition = small_batch()
    sample(model, condition, clip_keys(0, 0, range(3), "sample"), FlowConfig(steps=1))
    (both,) = seen
    assert both.keep_tokens.tolist() == [True] * 3 + [False] * 3
    assert both.keep_reference is None
    assert torch.equal(both.reference, condition.reference.repeat(2, 1, 1))


def test_loss_is_the_mean_square_over_valid_frames():
    v, target, lengths = torch.randn(2, 6, 3), torch.randn(2, 6, 3), torch.tensor([6, 2])
    v[1, 2:] = float("nan")
    loss = flow_loss(v, target, lengths)
    torch.testing.assert_close(loss[0], (v[0] - target[0]).square().mean())
    torch.testing.assert_close(loss[1], (v[1, :2] - target[1, :2]).square().mean())


def test_draws():
    lengths = torch.full((4000,), 100)
    keys = clip_keys(3, 7, range(4000), "draws")
    draws = training_draws(FlowConfig(), lengths, keys)
    assert draws.t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.keep_tokens.float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert draws.keep_reference.float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert draws.hidden.start.min() == 1
    assert draws.hidden.start.max() == 30
    assert len(set(draws.hidden.start.tolist())) == 30
    short = training_draws(FlowConfig(), torch.full((50,), 2), keys[:50])
    nothing = FlowConfig(max_reference=0.0)
    for hidden in (training_draws(nothing, lengths, keys).hidden, fixed_span(nothing, lengths)):
        assert (hidden.start == 0).all()
        assert torch.equal(hidden.end, lengths)
    assert set(short.hidden.start.tolist()) == {1}


def kolmogorov_smirnov(t: torch.Tensor, mean: float, scale: float) -> float:
    """sqrt(n) sup |F_n - F|, F the distribution of the sigmoid of N(mean, scale^2). It exceeds 1.95 for one sample of
    F in a thousand."""
    steps, t = torch.arange(len(t) + 1, dtype=torch.float64) / len(t), t.double().sort().values
    normal = NormalDist(mean, scale)
    exact = torch.tensor([normal.cdf(float(logit)) for logit in t.logit()], dtype=torch.float64)
    return len(t) ** 0.5 * max((steps[1:] - exact).max(), (exact - steps[:-1]).max()).item()


@pytest.mark.parametrize(
    ("times", "mean", "scale"),
    [("logit_normal", 0, 1), ("logit_normal:-0.8,0.8", -0.8, 0.8), ("logit_normal:1,2", 1, 2)],
)
def test_logit_normal_times(times, mean, scale):
    lengths, keys = torch.full((4000,), 100), clip_keys(3, 7, range(4000), "draws")
    t, *others = training_draws(FlowConfig(times=times), lengths, keys)
    assert t.dtype == torch.float32
    assert kolmogorov_smirnov(t, mean, scale) < 1.95
    assert kolmogorov_smirnov(t, mean + 0.1 * scale, scale) > 1.95
    assert kolmogorov_smirnov(t, mean, 1.2 * scale) > 1.95
    uniform, *same = training_draws(FlowConfig(), lengths, keys)
    assert t[uniform.argsort()].diff().min() > -1e-6
    assert all(torch.equal(*pair) for pair in zip((*others[:2], *others[2]), (*same[:2], *same[2]), strict=True))
    assert torch.equal(training_draws(FlowConfig(times=times), lengths[5:7], keys[5:7]).t, t[5:7])


def test_times_stay_finite_where_a_uniform_draw_is_0_or_1(monkeypatch):
    edges = torch.tensor([0.0, 1.0])[:, None].expand(2, 6)
    monkeypatch.setattr("agrepa_fast.flow.philox_uniform", lambda keys, count: edges)
    t = training_draws(FlowConfig(times="logit_normal"), torch.full((2,), 9), torch.arange(2)).t
    assert t.tolist() == [0, 1]


def test_a_clips_draws_depend_on_seed_step_place_and_use_alone():
    assert torch.equal(clip_keys(1, 2, range(8), "noise")[5:6], clip_keys(1, 2, [5], "noise"))
    keys = {
        int(clip_keys(a, b, [c], use)[0]) for a in (0, 1) for b in (0, 1) for c in (0, 1) for use in ("noise", "draws")
    }
    assert len(keys) == 16


def test_reference_prefix():
    mel = torch.ones(2, 4, 1)
    assert reference_prefix(mel, torch.tensor([1, 3])).flatten(1).tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_spans_to_fill_in_are_those_of_f5_tts(monkeypatch):
    """mask_from_frac_lengths of F5-TTS, from the same draws."""
    utils = import_alone("f5_tts.model.utils")
    lengths, keys = torch.tensor([100, 37, 8, 3]), clip_keys(0, 1, range(4), "draws")
    flow = FlowConfig(reference="infill", infill=[0.7, 1.0])
    *_, share, place, _ = philox_uniform(keys, 6).unbind(1)
    monkeypatch.setattr(torch, "rand_like", lambda _: place)
    want = utils.mask_from_frac_lengths(lengths, 0.7 + 0.3 * share)
    hidden = training_draws(flow, lengths, keys).hidden
    assert torch.equal(hidden.frames(want.shape[1]), want)
    mel = torch.ones(4, want.shape[1], 1)
    assert torch.equal(reference_around(mel, hidden)[..., 0] == 0, want)


def test_settings_that_stay_off_change_no_draw():
    keys = clip_keys(0, 1, range(4), "draws")
    assert torch.equal(philox_uniform(keys, 6)[:, :4], philox_uniform(keys, 4))


def test_everything_is_dropped_for_a_share_of_clips():
    flow, lengths = FlowConfig(drop_tokens=0.0, drop_reference=0.0, drop_all=0.25), torch.full((4000,), 50)
    draws = training_draws(flow, lengths, clip_keys(0, 0, range(4000), "draws"))
    assert torch.equal(draws.keep_tokens, draws.keep_reference)
    assert draws.keep_tokens.float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_the_loss_of_hidden_frames_alone_averaged_over_frames():
    """As upstream: the mean over all hidden frames of the batch, if the batch has its bucket's mean of frames."""
    flow = FlowConfig(reference="infill", infill=[0.8, 0.8], loss_region="hidden", average="frame")
    lengths = torch.tensor([30, 10])
    v, target = torch.randn(2, 2, 30, 3)
    hidden = training_draws(flow, lengths, clip_keys(0, 0, range(2), "draws")).hidden
    counted = counted_frames(flow, hidden, lengths)
    assert (counted.end - counted.start).tolist() == [24, 8]
    weights = (counted.end - counted.start) / expected_frames(flow, 20.0)
    ours = (flow_loss(v, target, counted) * weights).mean()
    torch.testing.assert_close(ours, (v - target)[hidden.frames(30)].square().mean())
    whole = FlowConfig(reference="infill", average="frame")
    counted = counted_frames(whole, hidden, lengths)
    weights = (counted.end - counted.start) / expected_frames(whole, 20.0)
    valid = torch.arange(30) < lengths[:, None]
    torch.testing.assert_close((flow_loss(v, target, counted) * weights).mean(), (v - target)[valid].square().mean())


def test_times_of_cosyvoice():
    times = sample_times(FlowConfig(schedule="cosine", steps=10))
    torch.testing.assert_close(times, 1 - torch.cos(torch.linspace(0, 1, 11) * 0.5 * torch.pi))


@pytest.mark.parametrize(("without", "wanted"), [("tokens", [True, True]), ("all", [True, False])])
def test_the_other_branch_of_guidance(without, wanted):
    seen = []

    def model(x, t, condition):
        seen.append(condition)
        return Velocity(torch.zeros_like(x), {})

    model.training, model.eval, model.train = False, lambda: None, lambda _: None
    _, condition = small_batch()
    sample(model, condition, torch.arange(3), FlowConfig(steps=1, guidance_without=without))
    assert seen[0].keep_tokens.tolist() == [True] * 3 + [False] * 3
    kept = seen[0].keep_reference
    assert (kept is None and without == "tokens") or [kept[0].item(), kept[3].item()] == wanted
