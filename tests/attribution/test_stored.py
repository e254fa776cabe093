import math

import pytest
import torch
from scipy.linalg import lstsq

from agrepa_fast.attribution.stored import PENALTIES, PooledStates, cka, lasp, ridge
from agrepa_fast.config import DOMAINS

# The measures compute in float64 and return fp32; pseudo-values are multiplied by the number of clips.
EXACT = {"atol": 2e-6, "rtol": 2e-6}


def random_states(clips: int = 18, layers: int = 2, times: int = 2, width: int = 8, teachers: int = 5, seed: int = 0):
    """Half of the clips of each domain, in no order; layers that hold something of the teacher below noise."""
    draw = torch.Generator().manual_seed(seed)
    domain = torch.arange(clips)[torch.randperm(clips, generator=draw)] % 2
    teacher = {name: torch.randn(clips, teachers, generator=draw) + 0.5 for name in DOMAINS}
    own = torch.stack([teacher[DOMAINS[number]][clip] for clip, number in enumerate(domain)])
    stored = own @ torch.randn(layers, 1, teachers, width, generator=draw)  # (layers, 1, clips, width)
    noise = torch.randn(layers, times, clips, width, generator=draw)
    hidden = (stored + 4 * torch.arange(1, times + 1)[:, None, None] * noise + 3).transpose(1, 2).contiguous()
    condition = torch.randn(clips, width, generator=draw)
    return PooledStates(hidden, condition, teacher, domain, tuple(0.1 * (k + 1) for k in range(times)), 7)


def random_projections(states: PooledStates, seed: int = 5) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    width = states.condition.shape[1]
    return {name: torch.randn(rows.shape[1], width, generator=draw) for name, rows in states.teacher.items()}


MEASURES = {"lasp": lambda states: lasp(states, random_projections(states)), "ridge": ridge, "cka": cka}


def cases(states: PooledStates):
    """Every (domain, layer, time) with the clips' places, features (n, D) and teacher vectors (n, E) in float64."""
    for number, name in enumerate(DOMAINS):
        clips = [clip for clip, of in enumerate(states.domain.tolist()) if of == number]
        for layer in range(states.hidden.shape[0]):
            for time in range(len(states.times)):
                yield (
                    layer,
                    time,
                    clips,
                    states.hidden[layer, clips, time].double(),
                    states.teacher[name][clips].double(),
                )


@pytest.mark.parametrize("name", ["lasp", "ridge", "cka"])
def test_fills_layer_scores(name):
    states = random_states()
    scores = MEASURES[name](states)
    assert scores.values.shape == (2, 18, 2, 1)
    assert scores.values.dtype == torch.float32
    assert torch.equal(scores.floor, torch.zeros(18))
    assert torch.equal(scores.domain, states.domain)
    assert (scores.measure, scores.recipe, scores.times, scores.step) == (name, "corrected", states.times, 7)
    speech = states.domain == 0  # a domain without clips needs neither a teacher nor a projection
    alone = states._replace(
        hidden=states.hidden[:, speech],
        condition=states.condition[speech],
        teacher={"speech": states.teacher["speech"][speech]},
        domain=states.domain[speech],
    )
    torch.testing.assert_close(MEASURES[name](alone).values, scores.values[:, speech], **EXACT)


@pytest.mark.parametrize("name", ["lasp", "ridge", "cka"])
def test_domains_do_not_leak_into_each_other(name):
    """The audio clips' states and teachers say nothing about speech; teacher rows of the other domain are not read."""
    states = random_states()
    speech = states.domain == 0
    teacher = {key: rows.clone() for key, rows in states.teacher.items()}
    teacher["audio"][~speech] *= torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    teacher["speech"][~speech], teacher["audio"][speech] = torch.nan, torch.nan
    hidden = torch.where(speech[:, None, None], states.hidden, states.hidden.flip(-1))
    before, after = MEASURES[name](states), MEASURES[name](states._replace(teacher=teacher, hidden=hidden))
    assert torch.equal(before.values[:, speech], after.values[:, speech])
    assert after.values.isfinite().all()
    assert not torch.isclose(before.values[:, ~speech], after.values[:, ~speech]).all(1).any()


def test_sign_anchor_flips_each_clip_alone():
    """Identity projection and condition (1, 0): the states that point left are turned round, the others are not."""
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-3.0, -4.0], [0.0, 2.0]])
    hidden = torch.stack((hidden, hidden * torch.tensor([-1.0, 1.0])), dim=1)[None]  # second time: mirrored
    teacher = {"speech": torch.tensor([[0.0, 5.0]]).expand(4, 2)}
    condition = torch.tensor([[2.0, 0.0]]).expand(4, 2)
    states = PooledStates(hidden, condition, teacher, torch.zeros(4, dtype=torch.long), (0.2, 0.8))
    values = lasp(states, {"speech": torch.eye(2)}, recipe="official").values[0, :, :, 0]
    half = math.sqrt(0.5)
    torch.testing.assert_close(values, torch.tensor([[half, -half], [-half, half], [0.8, -0.8], [1.0, 1.0]]))


@pytest.mark.parametrize("recipe", ["corrected", "official"])
def test_lasp_equals_plain_loops(recipe):
    states = random_states(width=6)
    projections = random_projections(states)
    expected = torch.zeros(2, 18, 2, 1)
    flips = []

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def project(rows, x):
        mean = sum(x) / len(x) if recipe == "corrected" else 0.0
        x = [value - mean for value in x]
        return [dot(row, x) / math.sqrt(dot(x, x)) for row in rows]

    for layer, time, clips, features, targets in cases(states):
        rows = projections[DOMAINS[states.domain[clips[0]]]].tolist()
        for clip, h, y in zip(clips, features.tolist(), targets.tolist(), strict=True):
            z, z_0 = project(rows, h), project(rows, states.condition[clip].tolist())
            flips.append(dot(z, z_0) < 0)
            sign = -1 if flips[-1] else 1
            expected[layer, clip, time] = sign * dot(z, y) / math.sqrt(dot(z, z) * dot(y, y))
    assert any(flips)
    assert not all(flips)
    scores = lasp(states, projections, recipe=recipe)
    assert scores.recipe == recipe
    torch.testing.assert_close(scores.values, expected, **EXACT)


def fitted(x, y, penalty: float, asked):
    """Ridge regression with an unpenalised intercept, solved as least squares with a row for each penalised weight."""
    width, one = x.shape[1], torch.ones(1, 1, dtype=torch.float64)
    rows = torch.cat((torch.cat((x, one.expand(len(x), 1)), 1), penalty**0.5 * torch.eye(width, width + 1).double()))
    right = torch.cat((y, torch.zeros(width, y.shape[1])))
    weights = torch.from_numpy(lstsq(rows.numpy(), right.numpy())[0])
    return torch.cat((asked, one.expand(len(asked), 1)), 1) @ weights


def naive_ridge(states: PooledStates, folds: int):
    """(values, chosen penalties): everything is refitted, also for the leave-one-out errors."""
    values, chosen = torch.zeros(*states.hidden.shape[:3], 1), []
    for layer, time, clips, features, targets in cases(states):
        for fold in range(folds):
            held = [i for i in range(len(clips)) if i % folds == fold]
            kept = [i for i in range(len(clips)) if i % folds != fold]
            mean, deviation = features[kept].mean(0), features[kept].std(0, correction=0)
            x, y = (features - mean) / deviation, targets
            mean_eigenvalue = float(x[kept].square().sum() / len(kept))
            errors = []
            for penalty in PENALTIES.tolist():
                error = 0.0
                for i in kept:
                    rest = [j for j in kept if j != i]
                    error += float(
                        (fitted(x[rest], y[rest], penalty * mean_eigenvalue, x[[i]]) - y[[i]]).square().sum()
                    )
                errors.append(error)
            chosen.append(min(range(len(errors)), key=errors.__getitem__))
            prediction = fitted(x[kept], y[kept], float(PENALTIES[chosen[-1]]) * mean_eigenvalue, x[held])
            centre = y[kept].mean(0)
            cosine = torch.cosine_similarity(prediction - centre, y[held] - centre)
            for i, value in zip(held, cosine.tolist(), strict=True):
                values[layer, clips[i], time] = value
    return values, chosen


# More clips than features; fewer clips than features and teacher dimensions, where only the dual is small; 4 clips of a
# domain, so 4 folds of one clip each although 5 are asked for.
@pytest.mark.parametrize(("clips", "width", "teachers"), [(26, 3, 2), (18, 12, 11), (8, 5, 3)])
def test_ridge_equals_refitting(clips, width, teachers):
    states = random_states(clips, width=width, teachers=teachers, layers=1)
    expected, chosen = naive_ridge(states, folds=min(5, clips // 2))
    assert len({index for index in chosen if 0 < index < len(PENALTIES) - 1}) > 1  # the choice of penalty is tested
    torch.testing.assert_close(ridge(states).values, expected, **EXACT)


def test_ridge_takes_the_number_of_folds():
    states = random_states(clips=18, layers=1, times=1)
    torch.testing.assert_close(ridge(states, folds=2).values, naive_ridge(states, folds=2)[0], **EXACT)


def test_held_out_clips_do_not_leak_into_ridge():
    """With more features than clips a map that has seen a clip gives its teacher back, whatever it is."""
    draw = torch.Generator().manual_seed(3)
    hidden, teacher = torch.randn(8, 40, 1, 200, generator=draw), torch.randn(40, 30, generator=draw)
    states = PooledStates(hidden, hidden[0, :, 0], {"speech": teacher}, torch.zeros(40, dtype=torch.long), (0.5,))
    assert ridge(states).values.mean().abs() < 0.02


def hsic(k: torch.Tensor, other: torch.Tensor) -> float:
    """The unbiased estimator as Song et al. 2012, eq. 5, write it."""
    n, ones = len(k), torch.ones(len(k), dtype=torch.float64)
    k, other = k - k.diag().diag(), other - other.diag().diag()
    middle = (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    return float((k @ other).trace() + middle - 2 / (n - 2) * (ones @ k @ other @ ones)) / (n * (n - 3))


def naive_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))


def biased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


@pytest.mark.parametrize(("clips", "width"), [(18, 4), (12, 20)])  # 12 clips: the smallest number, 6 of a domain
def test_cka_equals_the_textbook_and_a_jackknife_that_leaves_clips_out(clips, width):
    states = random_states(clips, width=width)
    scores = cka(states)
    for layer, time, places, x, y in cases(states):
        n, whole = len(places), naive_cka(x, y)
        rest = [[j for j in range(n) if j != i] for i in range(n)]
        without = torch.tensor([naive_cka(x[kept], y[kept]) for kept in rest])
        torch.testing.assert_close(scores.values[layer, places, time, 0], n * whole - (n - 1) * without, **EXACT)
        if time == 0:
            name = DOMAINS[states.domain[places[0]]]
            first = cka(states._replace(hidden=states.hidden[:, :, :1], times=states.times[:1]))
            stderr = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
            torch.testing.assert_close(first.stderr(name)[layer], stderr, atol=1e-5, rtol=1e-5)
            corrected = n * whole - (n - 1) * without.mean()
            torch.testing.assert_close(first.mean(name)[layer], corrected, atol=1e-5, rtol=1e-5)


def test_cka_of_the_teacher_rotated_scaled_and_shifted_is_one():
    states = random_states(width=5, layers=1, times=1)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2))).Q
    own = torch.where((states.domain == 0)[:, None], states.teacher["speech"], states.teacher["audio"])
    values = cka(states._replace(hidden=(0.3 * own @ rotation + 2)[None, :, None])).values
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-5, rtol=0)


def test_cka_of_independent_states_is_zero_on_average():
    draw = torch.Generator().manual_seed(4)
    hidden, teacher = torch.randn(20, 24, 1, 2000, generator=draw), torch.randn(24, 2000, generator=draw)
    states = PooledStates(hidden, hidden[0, :, 0], {"audio": teacher}, torch.ones(24, dtype=torch.long), (0.5,))
    assert biased_cka(hidden[0, :, 0], teacher) > 0.9
    assert cka(states).mean("audio").mean().abs() < 0.05


@pytest.mark.parametrize("name", ["ridge", "cka"])
def test_the_layer_that_stores_the_teacher_wins(name):
    """L3 holds the speech teacher in a rotated, shifted form, L2 the audio teacher; all else is noise."""
    states = random_states(clips=40, layers=5, width=30, teachers=8)
    draw = torch.Generator().manual_seed(6)
    hidden = torch.randn(5, 40, 2, 30, generator=draw)
    for number, layer in ((0, 2), (1, 1)):
        clips = states.domain == number
        planted = states.teacher[DOMAINS[number]][clips] @ torch.linalg.qr(torch.randn(30, 8, generator=draw)).Q.T
        hidden[layer, clips] = 3 * planted[:, None] + 0.3 * hidden[layer, clips] + 10
    scores = MEASURES[name](states._replace(hidden=hidden))
    for domain, layer in (("speech", 2), ("audio", 1)):
        mean = scores.mean(domain)
        assert mean.argmax() == layer
        assert mean[layer] > 0.7
        assert mean[torch.arange(5) != layer].abs().max() < 0.35


@pytest.mark.parametrize("name", ["lasp", "ridge", "cka"])
def test_undefined_scores_are_zero(name):
    """States or teachers without anything to compare: all 0; one value in a clip (LASP's layer norm makes it 0), or the
    same in all clips of a domain (the others centre it to 0)."""
    states = random_states()
    constant = torch.full_like(states.hidden, 0.1)
    undefined = {
        "lasp": (torch.arange(18.0)[:, None, None] / 7).expand_as(states.hidden),
        "ridge": states.hidden[:, :1].expand_as(states.hidden),
        "cka": states.hidden[:, :1].expand_as(states.hidden),
    }
    for hidden in (0 * constant, constant, undefined[name]):
        assert not MEASURES[name](states._replace(hidden=hidden)).values.any()
    for value in (0.0,) if name == "lasp" else (0.0, 0.1):
        teacher = {key: torch.full_like(rows, value) for key, rows in states.teacher.items()}
        assert not MEASURES[name](states._replace(teacher=teacher)).values.any()


@pytest.mark.parametrize("name", ["lasp", "ridge", "cka"])
def test_degenerate_clips_give_finite_scores(name):
    """Clips that are equal but for one, so constant without it, or but for four; teacher rows of zeros; huge and tiny
    states."""
    states = random_states()
    one, four = torch.full_like(states.hidden, 0.1), torch.full_like(states.hidden, 0.1)
    one[:, [(states.domain == number).nonzero()[0, 0] for number in (0, 1)]] = 5.0
    four[:, :4] = torch.tensor([0.7, -3.0, 1.3, 0.9])[:, None, None]
    teacher = {key: torch.cat((torch.zeros_like(rows[:4]), rows[4:])) for key, rows in states.teacher.items()}
    for hidden in (states.hidden, one, four, 1e12 * states.hidden, 1e-12 * states.hidden):
        assert MEASURES[name](states._replace(hidden=hidden, teacher=teacher)).values.isfinite().all()


def test_cka_that_is_undefined_without_a_clip_counts_as_zero_there():
    """U-centring takes out all that a single odd clip adds to its row and column, so two odd clips need each other."""
    states = random_states(layers=1, times=1)._replace(domain=torch.zeros(18, dtype=torch.long))
    one, two = torch.full_like(states.hidden, 0.1), torch.full_like(states.hidden, 0.1)
    one[:, :1], two[:, :2] = states.hidden[:, :1], states.hidden[:, :2]
    assert not cka(states._replace(hidden=one)).values.any()
    whole = naive_cka(two[0, :, 0].double(), states.teacher["speech"].double())
    values = cka(states._replace(hidden=two)).values[0, :2, 0, 0]
    torch.testing.assert_close(values, torch.full((2,), 18 * whole), **EXACT)


@pytest.mark.parametrize("name", ["ridge", "cka"])
def test_scale_and_offset_of_the_states_do_not_matter(name):
    """Powers of two and small integers, so that fp32 holds the changed states exactly."""
    states = random_states()
    hidden = (states.hidden * 64).round() / 64
    a, b = (MEASURES[name](states._replace(hidden=changed)) for changed in (hidden, 2**20 * (hidden + 8)))
    torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


def test_errors_name_what_was_wanted_and_what_came():
    states = random_states(clips=9)  # 5 of speech, 4 of audio
    projections = random_projections(states)
    with pytest.raises(ValueError, match="D = 8, D_tok = 6"):
        lasp(states._replace(condition=states.condition[:, :6]), projections)
    with pytest.raises(ValueError, match=r"4 clips are of audio.*\['speech'\]"):
        lasp(states, {"speech": projections["speech"]})
    with pytest.raises(ValueError, match="recipe='release'"):
        lasp(states, projections, recipe="release")
    with pytest.raises(ValueError, match="6 clips of speech, not 5"):
        cka(states)
    with pytest.raises(ValueError, match="2 folds, not 1"):
        ridge(states, folds=1)
    few = random_states(clips=7)
    with pytest.raises(ValueError, match="4 clips of audio, not 3"):
        ridge(few)
