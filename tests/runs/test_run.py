"""One rank's work against values worked out by hand: what hits every run alike shows in no comparison of runs."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from agrepa_fast.alignment import aligner as aligner_module
from agrepa_fast.attribution.csv import append_csv
from agrepa_fast.attribution.foga import ProbeBatch, foga
from agrepa_fast.attribution.selection import LayerSelection, select_layers
from agrepa_fast.config import DataConfig, FlowConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.batch import collate
from agrepa_fast.data.index import load_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.flow import flow_loss, integrate, reference_prefix, sample, sway_times, training_draws
from agrepa_fast.kernels import flow_mix
from agrepa_fast.lr_schedule import lr_factor
from agrepa_fast.models.backbone import Layer, Velocity
from agrepa_fast.probing.fixed_clips import FixedClips, validation_clips
from agrepa_fast.probing.validation import validation_loss
from agrepa_fast.seeds import clip_keys
from agrepa_fast.training.context import RunContext
from agrepa_fast.training.metrics import Metrics
from agrepa_fast.training.run import Run

from ..ranks import run_training
from ..testing import small_batch, small_model


@pytest.fixture(scope="module")
def index(preset):
    return load_index(preset.parent)


class Still(torch.nn.Module):
    """Velocity zero; remembers its arguments. Its own engine."""

    optimizer = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.weight.grad = torch.zeros(1)

    @property
    def module(self):
        return self

    def zero_optimization_stage(self):
        return 0

    def forward(self, x_t, t, condition, **_):
        self.seen = x_t, t, condition
        return Velocity(torch.zeros_like(x_t), {})

    def backward(self, loss):
        self.loss = loss

    def step(self):
        pass

    def is_gradient_accumulation_boundary(self):
        return True


@pytest.mark.parametrize("overrides", [(), ("flow.prediction=x", "flow.times=logit_normal:3,1")], ids=["v", "x"])
def test_a_step_by_hand(overrides, index, tmp_path):
    config = load_config("demo", ["flow.sigma=0.7", "flow.drop_tokens=0.6", "flow.drop_reference=0.3", *overrides])
    engine, watched, given = Still(), [], []
    losses = {"align_loss": torch.tensor(2.0), "bitc_loss": torch.tensor(1.0)}
    aligner = SimpleNamespace(
        layers=lambda step: (),
        pools=lambda step: True,
        begin=lambda step: None,
        averaged_layers=lambda step: (),
        attention_layers=lambda step: (),
        losses=lambda *args: given.append(args) or dict(losses),
        reduce=lambda step: torch.tensor(0.0),
    )
    choice = SimpleNamespace(aligner=aligner, keep_gradient_norms=lambda norms, step: watched.append(step))
    batch = next(TrainBatches(index, config.data, BatchLayout(16, 2, 0, 1), seed=0, center=True))
    batch = replace(batch, places=tuple(range(8, 16)))
    context = RunContext(config, index, torch.device("cpu"), 0, 1, tmp_path)
    Run(context, engine, None, choice, None).micro_step(batch, step=3)
    x_t, t, condition = engine.seen
    draws = training_draws(config.flow, condition.lengths, clip_keys(0, 3, range(8, 16), "draws"))
    wanted, target = flow_mix(batch.mel, draws.t, clip_keys(0, 3, range(8, 16), "noise"), 0.7)
    assert torch.equal(t, draws.t)
    assert torch.equal(x_t, wanted)
    assert torch.equal(condition.reference, reference_prefix(batch.mel, draws.hidden.start))
    assert torch.equal(condition.keep_tokens, draws.keep_tokens)
    assert torch.equal(condition.keep_reference, draws.keep_reference)
    clips = flow_loss(0 * target, target, condition.lengths)
    if overrides:  # 1 - t counts as 0.05 or more
        assert 0 < (t > 0.95).sum() < 8
        clips *= ((1 - t) / (1 - t).clamp(min=0.05)).square()
    torch.testing.assert_close(engine.loss, clips.mean() + 3)
    ((_, _, t_of_losses, kept, step_of_losses, attention),) = given
    assert t_of_losses is t
    assert torch.equal(kept, draws.keep_tokens)
    assert (step_of_losses, attention) == (3, {})
    assert watched == [3]


def test_graphs_are_asked_for_the_variant_of_the_aligner(index, tmp_path):
    """Not for its layers alone: a refresh may give the same layers new weights, which a graph keeps."""
    config, engine, asked = load_config("demo"), Still(), []
    aligner = SimpleNamespace(
        begin=lambda step: None,
        averaged_layers=lambda step: (),
        layers=lambda step: ("layers",),
        variant=lambda step: ("layers and weights", step),
        reduce=lambda step: torch.tensor(0.0),
    )
    choice = SimpleNamespace(aligner=aligner, keep_gradient_norms=lambda norms, step: None)
    batch = next(TrainBatches(index, config.data, BatchLayout(16, 2, 0, 1), seed=0, center=True))
    run = Run(RunContext(config, index, torch.device("cpu"), 0, 1, tmp_path), engine, None, choice, None)
    run.graphs = lambda *given: asked.append(given[3]) or (torch.tensor(1.0), {}, torch.zeros(16))
    run.micro_step(batch, step=3)
    assert asked == [("layers and weights", 3)]


@pytest.mark.parametrize(("world", "chunk"), [(1, 10), (3, 3), (4, 2)])
def test_validation_by_hand_on_ranks_that_do_not_divide_the_clips(world, chunk, index):
    config, model, total = load_config("demo", ["eval.times=[0.3,0.6]", f"probe.chunk={chunk}"]), Still(), Counter()
    for rank in range(world):
        clips = FixedClips(index, "val", 5, config, "cpu", rank, world)
        total.update(validation_loss(model, clips))  # one process: the ranks' parts of the mean
        reference = model.seen[2].reference[0]
        frames = max(1, int(0.15 * model.seen[2].lengths[0]))
        assert reference[:frames].any(-1).all()
        assert not reference[frames:].any()
    wanted = torch.zeros(len(clips), 2)
    for place, clip in enumerate(clips.samples):
        mel = collate([clip], (0,), index).mel
        for n in range(2):
            _, target = flow_mix(mel, torch.zeros(1), clip_keys(0, n, [place], "validation"), 0.5)
            wanted[place, n] = target.square().mean()
    assert total["val/flow_loss"] == pytest.approx(wanted.mean().item(), rel=1e-5)
    times = [total["val/flow_loss_t0.3"], total["val/flow_loss_t0.6"]]
    assert times == pytest.approx(wanted.mean(0).tolist(), rel=1e-5)
    domains = [total[f"val/flow_loss_{name}"] for name in index.domains]
    assert domains == pytest.approx(wanted.unflatten(0, (len(index.domains), -1)).mean((1, 2)).tolist(), rel=1e-5)
    assert model.training


def test_floor_is_what_no_ablation_changes(index):
    model = small_model()

    def wobble(module, args, out):  # the plain forward differs by 0.05 %
        return out._replace(v=out.v * (1 + 5e-4 * (args[0].shape[0] == len(args[1]))))

    model.register_forward_hook(wobble)
    batch = ProbeBatch(*small_batch(), torch.tensor([0, 1, 0]), (0, 1, 2))
    scores = foga(model, batch, times=(0.3,), draws=2)
    torch.testing.assert_close(scores.floor, torch.full((3,), 5e-4), atol=1e-5, rtol=0)
    assert not torch.isclose(scores.values[..., 0], scores.values[..., 1]).any()  # draws differ
    scores = replace(scores, floor=torch.tensor([1e-3, 5.0, 2e-3]))
    assert scores.floor_of("speech") == pytest.approx(1.5e-3)


def test_a_layer_that_is_not_measured_is_not_chosen():
    model = small_model(2)
    base = foga(model, ProbeBatch(*small_batch(), torch.tensor([0, 0, 0]), (0, 1, 2)), times=(0.5,))
    change = torch.tensor([[0.0, 0.0, 9.0], [0.4, 0.5, 0.6]])[..., None, None]
    assert select_layers(replace(base, values=change, floor=torch.full((3,), 1e-7)), k=1).layers["speech"] == (2,)
    noisy = torch.tensor([[0.0, 0.0, 1.0]] * 2)[..., None, None]  # mean 1/3, standard error 1/3
    noisy[..., 0, 0] += 0.1  # 1.3 standard errors
    with pytest.raises(ValueError, match="0 of 2"):
        select_layers(replace(base, values=noisy, floor=torch.full((3,), 1e-7)), k=1)


def test_a_probe_repeated_by_a_resume_is_written_once(tmp_path):
    scores = foga(small_model(2), ProbeBatch(*small_batch(), torch.tensor([0, 0, 0]), (0, 1, 2)), times=(0.5,))
    sizes = []
    for step in (1, 2, 2):
        append_csv(tmp_path / "a.csv", replace(scores, step=step))
        sizes.append(len((tmp_path / "a.csv").read_text().splitlines()))
    assert sizes == [5, 9, 9]


def test_a_batch_takes_every_clip_once_an_epoch(index):
    batches = TrainBatches(index, DataConfig(), BatchLayout(8, 1, 0, 1), seed=0, center=True)
    keys = [key for _ in range(11) for key in next(batches).keys]  # 44 clips a domain: two epochs of 22
    assert len(set(keys)) == 44
    assert {keys.count(key) for key in keys} == {2}


def test_conditions_are_dropped_one_by_one(model):
    mel, condition = small_batch()
    t, nothing = torch.full((3,), 0.5), torch.zeros(3, dtype=torch.bool)
    no_tokens, no_reference = replace(condition, keep_tokens=nothing), replace(condition, keep_reference=nothing)

    def v(given):
        return model(mel, t, given).v

    assert torch.equal(v(no_tokens), v(replace(no_tokens, tokens=(condition.tokens + 1) % 30)))
    assert not torch.equal(v(no_tokens), v(replace(no_tokens, reference=2 * condition.reference)))
    assert torch.equal(v(no_reference), v(replace(no_reference, reference=2 * condition.reference)))
    assert not torch.equal(v(no_reference), v(replace(no_reference, tokens=(condition.tokens + 1) % 30)))


def test_scales_of_time_and_tokens_reach_the_model(model):
    _, condition = small_batch()
    torch.testing.assert_close(model.tokens(condition, 37).norm(dim=-1), torch.full((3, 37), 5.0))
    seen = []
    model.time.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.time(torch.tensor([0.003]))
    assert seen[0][0, 0].item() == pytest.approx(torch.tensor(3.0).cos().item(), abs=1e-5)


def test_euler_and_the_sampler_use_each_steps_first_time():
    times = sway_times(5, -1.0)
    wanted = sum(2 * float(a * (b - a)) for a, b in pairwise(times))
    assert integrate(lambda x, t: 2 * t, torch.zeros(1), times).item() == pytest.approx(wanted, rel=1e-5)
    _, condition = small_batch()
    model, seen = Still(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[1][0].item()))
    sample(model, condition, clip_keys(0, 0, range(3), "sample"), FlowConfig(steps=5))
    assert seen == pytest.approx(times[:-1].tolist())


def test_tokens_and_reference_are_dropped_apart():
    flow = FlowConfig(drop_tokens=0.3, drop_reference=0.6)
    draws = training_draws(flow, torch.full((4000,), 100), clip_keys(0, 0, range(4000), "draws"))
    both = (draws.keep_tokens & draws.keep_reference).float().mean().item()
    assert draws.keep_tokens.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert draws.keep_reference.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert both == pytest.approx(0.28, abs=0.03)


SIZES = SimpleNamespace(layers=[Layer((), width=8)], condition_width=192, parameters=torch.nn.Linear(1, 1).parameters)


def test_heads_step_on_the_mean_gradient_clipped_and_scheduled(monkeypatch):
    config = load_config("demo", ["model.dim=8", "model.heads=1", "align.weight=0.5", "train.clip_norm=1e9"])
    made = aligner_module.Aligner(config, SIZES, {"speech": 3}, torch.device("cpu"))
    made.select(LayerSelection("fixed:1", {"speech": (1,)}, {"speech": (1.0,)}))
    batch = SimpleNamespace(keys="ab", teacher={"speech": torch.randn(2, 3)}, domain=torch.zeros(2, dtype=torch.int64))
    hidden = {0: torch.randn(2, 192), 1: torch.randn(2, 8)}
    loss = sum(made.losses(hidden, batch, torch.rand(2), None, 0).values())
    made.config = replace(config, align=replace(config.align, weight=1.0))
    monkeypatch.setattr(
        aligner_module, "all_sum", lambda values: 6 * values
    )  # as if 4 ranks held 1, 1, 2, 2 times this
    monkeypatch.setattr(aligner_module.dist, "get_world_size", lambda: 4)
    loss.backward()
    before = [p.grad.clone() for p in made.parameters()]
    after, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, norm):
        after.extend(p.grad.clone() for p in parameters)
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    norm = made.reduce(3)
    made.step(3)
    torch.testing.assert_close(norm, torch.cat([1.5 * gradient.flatten() for gradient in before]).norm())
    assert all(torch.allclose(1.5 * a, b) for a, b in zip(before, after, strict=True))
    assert made.optimizer.param_groups[0]["lr"] == config.align.lr * lr_factor(config.train, 3)


def test_ranks_reduce_the_heads_of_domains_that_they_have_no_clip_of(monkeypatch):
    """A user's objective may skip a domain without clips: the other rank sends those gradients nevertheless."""
    config = load_config("demo", ["model.dim=8", "model.heads=1"])
    made = aligner_module.Aligner(config, SIZES, {"speech": 3, "audio": 3}, torch.device("cpu"))
    made.select(LayerSelection("fixed:1", {"speech": (1,), "audio": (1,)}, {"speech": (1.0,), "audio": (1.0,)}))
    sent = []
    monkeypatch.setattr(aligner_module, "all_sum", lambda values: sent.append(values) or values)
    monkeypatch.setattr(aligner_module.dist, "get_world_size", lambda: 2)
    parameters = dict(made.heads.named_parameters())
    for name, parameter in parameters.items():
        if "speech" in name:
            parameter.grad = torch.ones_like(parameter)
    for projection in made.bitc.parameters():
        projection.grad = torch.zeros_like(projection)
    norm = made.reduce(0)
    assert sent[0].numel() == sum(p.numel() for p in made.parameters())
    speech = sum(p.numel() for name, p in parameters.items() if "speech" in name)
    assert norm == pytest.approx((speech / 4) ** 0.5)


def test_align_weight():
    config = load_config("demo", ["model.dim=8", "model.heads=1", "align.weight=0.5"])
    batch = SimpleNamespace(keys="ab", teacher={"speech": torch.randn(2, 3)}, domain=torch.zeros(2, dtype=torch.int64))
    hidden, losses = {0: torch.randn(2, 192), 1: torch.randn(2, 8)}, []
    for weight in (0.5, 1.0):
        made = aligner_module.Aligner(
            replace(config, align=replace(config.align, weight=weight)), SIZES, {"speech": 3}, torch.device("cpu")
        )
        made.select(LayerSelection("fixed:1", {"speech": (1,)}, {"speech": (1.0,)}))
        losses.append(made.losses(hidden, batch, torch.rand(2), None, 0)["align_loss"])
    torch.testing.assert_close(2 * losses[0], losses[1])


def test_metrics_are_means_since_the_last_flush(tmp_path):
    made = Metrics(tmp_path, 0, 1, 8)
    made.open(9, 0)
    for step, values in ((2, (1.0, 3.0)), (4, (5.0, 9.0))):
        for value in values:
            made.add(loss=torch.tensor(value))
        assert made.flush(step)["train/loss"] == sum(values) / 2
    made.close()
    resumed = Metrics(tmp_path, 0, 1, 8)
    resumed.open(9, 2)
    resumed.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2]


@pytest.mark.parametrize(
    ("stage", "ranks", "precision"),
    [pytest.param(0, 1, "fp32", marks=pytest.mark.drill), (2, 2, "fp32"), (2, 1, "bf16")],
)
def test_ema_is_the_average_of_the_master_weights_also_after_a_resume(stage, ranks, precision, preset, tmp_path):
    args = ("--ds_config", f"zero{stage}.json", f"run.dir={tmp_path}/run")
    more = ("train.save_every=1", "train.keep=9", f"train.precision={precision}", "train.ema_decay=0.4")
    run_training(ranks, *args, "--preset", str(preset), *more, cwd=tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    average = load_file(folder / "step00000001" / "ema.safetensors")
    for step in range(2, 6):
        decay = min(0.4, step / (9 + step))
        for name, weights in load_file(folder / f"step{step:08d}" / "model.safetensors").items():
            average[name] = decay * average[name] + (1 - decay) * weights
    wanted = load_file(folder / "step00000005" / "ema.safetensors")
    for name in average:
        torch.testing.assert_close(average[name], wanted[name], atol=1e-6, rtol=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    run_training(ranks, *args, "--resume", "step00000003", cwd=tmp_path)
    resumed = load_file(folder / "step00000005-2" / "ema.safetensors")
    for name in resumed:
        torch.testing.assert_close(resumed[name], wanted[name], atol=1e-6, rtol=1e-5)
    # what the averaged model computes is what its exported weights compute, at every stage
    from agrepa_fast import load_model

    model, config = load_model(folder / "step00000005")
    clips = validation_clips(load_index(preset.parent), config, "cpu")
    got = validation_loss(model, clips)["val/flow_loss"]
    assert summary["val/flow_loss"]["ema"] == pytest.approx(got, abs=1e-5 if precision == "fp32" else 0.05)
    live = load_model(folder / "step00000005", live=True)[0].state_dict()
    torch.testing.assert_close(live, load_file(folder / "step00000005" / "model.safetensors"))
