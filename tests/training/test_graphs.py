"""CUDA graphs of the training step: on a CPU a stand-in with their rules takes their place, on a GPU they are real."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from agrepa_fast import device
from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.alignment.registry import OBJECTIVES
from agrepa_fast.attribution.selection import LayerSelection
from agrepa_fast.config import TrainConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.batch import Batch, TeacherFrames
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.errors import UserError
from agrepa_fast.flow import flow_loss
from agrepa_fast.kernels import flow_mix, force_backend, philox_uniform
from agrepa_fast.seeds import clip_keys
from agrepa_fast.training import captured_step as graphs

from ..ranks import run_training
from ..testing import Operations, assert_same_curve, small_batch, small_model
from .graphs_on_ranks import (
    capture,
    plant_captures,
    plant_failing_captures,
    plant_few_shapes,
    plant_few_shapes_on_rank_0,
    refuse_captures,
)
from .in_process import ds_values


@pytest.fixture
def captures(monkeypatch):
    """What `captured` was called for; a capture is the operations of one call, on the same buffers, without Python."""
    made = []

    def count(call, pool):
        made.append(pool)
        return capture(call, pool)

    monkeypatch.setattr(device, "captured", count)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    return made


def batch(frames=37, seed=1, lengths=(20, 11)) -> Batch:
    mel, condition = small_batch((frames, *lengths), frames, seed)
    teacher = {"speech": torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))}
    return Batch(("a", "b", "c"), torch.tensor([0, 1, 0]), mel, condition, teacher, (0, 1, 2))


FROZEN = """
import torch.nn as nn
import torch.nn.functional as F
from agrepa_fast import Objective

class Frozen(Objective):
    tap = "pooled"

    def head(self, width, target_width):
        live, frozen = nn.Linear(width, target_width), nn.Linear(target_width, target_width)
        for part in (live, frozen):
            nn.init.eye_(part.weight)
        return nn.Sequential(live, frozen.requires_grad_(False))

    def loss(self, head, tap, target, mask, t):
        return 1 - F.cosine_similarity(head(tap.float()), target, dim=-1)
"""


class Step:
    """A model with a head of its own, and the losses of a micro-batch."""

    def __init__(self):
        self.model, self.head = small_model(2), torch.nn.Linear(32, 5)
        self.aligns, self.calls = True, 0

    def parameters(self):
        return [*self.model.parameters(), *self.head.parameters()]

    def losses(self, given: Batch, keys: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        self.calls += 1
        t = philox_uniform(keys[0], 1)[:, 0]
        x_t, target = flow_mix(given.mel, t, keys[1], 0.5)
        out = self.model(x_t, t, given.condition, capture=(2,), pooled=True)
        align = (self.head(out.hidden[2]) - given.teacher["speech"]).square().mean() if self.aligns else x_t.sum() * 0
        clips = flow_loss(out.v, target, given.condition.lengths)
        return {"flow_loss": clips.mean(), "align_loss": align}, clips


def keys(step: int) -> torch.Tensor:
    return torch.stack([clip_keys(0, step, range(3), use) for use in ("draws", "noise")])


def gradients(step: Step, total: torch.Tensor) -> list[torch.Tensor | None]:
    for parameter in step.parameters():
        parameter.grad = None
    (total * 0.5).backward()  # 0.5: the share of a micro-batch
    return [None if p.grad is None else p.grad.clone() for p in step.parameters()]


def assert_equals_eager(step: Step, graphed: graphs.GraphedLosses, given: Batch, number: int) -> None:
    total, losses, clips = graphed(step.losses, given, keys(number), (step.aligns,))
    replayed = gradients(step, total)
    wanted, wanted_clips = step.losses(given, keys(number))
    torch.testing.assert_close(clips, wanted_clips.detach(), atol=1e-6, rtol=1e-5)
    assert losses.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(losses[name], wanted[name].detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(total, sum(wanted.values()), atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(replayed, gradients(step, sum(wanted.values())), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_replays_give_the_losses_and_gradients_of_live_weights_and_new_batches(captures):
    step, said = Step(), []
    graphed = graphs.GraphedLosses(step.parameters, 2, said.append)
    for number in range(3):
        assert_equals_eager(step, graphed, batch(seed=number), number)
        with torch.no_grad():
            for parameter in step.parameters():  # an optimizer's step
                parameter.mul_(1.1)
    assert len(captures) == len(said) == 1
    before = step.calls
    graphed(step.losses, batch(), keys(9), (True,))
    assert step.calls == before  # replayed: no Python of the losses


def test_gradients_are_scaled_by_one_kernel_per_type(captures):
    """As exactly as each for itself: a factor in bf16 would round 0.3."""
    types = (torch.bfloat16, torch.float32)
    weights = [torch.nn.Parameter(torch.randn(size).to(dtype)) for dtype in types for size in (3, 200, 5)]

    def losses(given: Batch, keys: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        clips = sum(weight.float().square().sum() for weight in weights).expand(3)
        return {"flow_loss": clips.mean()}, clips

    total, _, _ = graphs.GraphedLosses(lambda: weights, 1, lambda line: None)(losses, batch(), keys(0))
    share = total * 0.3
    with Operations() as operations:
        share.backward()
    multiplies = [name for name in operations.names if "mul" in name]  # one list per type would be a kernel per tensor
    assert multiplies == ["aten.mul.Tensor"] * (1 + len(types))  # the share's own
    for weight in weights:
        assert torch.equal(weight.grad, 2 * weight.detach() * torch.tensor(0.3))


def test_shapes_beyond_the_limit_run_as_they_come(captures):
    step = Step()
    graphed = graphs.GraphedLosses(step.parameters, 2, lambda line: None)
    for number, frames in enumerate((37, 29, 33, 37, 29, 33)):
        assert_equals_eager(step, graphed, batch(frames), number)
    assert len(captures) == 2
    assert captures[0] is captures[1]  # one pool


def test_clips_without_padding_have_a_graph_of_their_own(captures):
    """Theirs has no masks. Both are of one shape, and of the limit."""
    step = Step()
    graphed = graphs.GraphedLosses(step.parameters, 1, lambda line: None)
    for number, lengths in enumerate(((37, 37), (20, 11), (37, 37), (20, 11))):
        assert_equals_eager(step, graphed, batch(seed=number, lengths=lengths), number)
    assert len(captures) == 2


def test_a_parameter_of_padding_alone_has_a_gradient_where_there_is_padding(captures):
    class Padding(Step):
        def __init__(self):
            super().__init__()
            self.filler = torch.nn.Parameter(torch.ones(3))

        def parameters(self):
            return [*super().parameters(), self.filler]

        def losses(self, given, keys):
            losses, clips = super().losses(given, keys)
            extra = self.filler.sum() if given.condition.padded else clips.sum() * 0
            return losses | {"filler_loss" if given.condition.padded else "no_loss": extra}, clips

    step = Padding()
    graphed = graphs.GraphedLosses(step.parameters, 1, lambda line: None)
    for number, lengths in enumerate(((37, 37), (20, 11), (37, 37), (20, 11))):
        assert_equals_eager(step, graphed, batch(seed=number, lengths=lengths), number)


def test_other_layers_or_moved_weights_are_captured_again(captures):
    step = Step()
    graphed = graphs.GraphedLosses(step.parameters, 2, lambda line: None)
    assert_equals_eager(step, graphed, batch(), 0)
    step.aligns = False
    assert_equals_eager(step, graphed, batch(), 1)  # the head has no gradient, instead of zeros
    step.model.blocks[1].ffn.fc1.weight.data = 2 * step.model.blocks[1].ffn.fc1.weight.data
    assert_equals_eager(step, graphed, batch(), 2)
    assert len(captures) == 3


@pytest.mark.parametrize("objective", ["pooled", pytest.param("layersync", marks=pytest.mark.drill)])
def test_new_weights_of_the_same_layers_are_captured_again(objective, captures):
    """As a refresh gives them: heads stay where they are, and layersync has none."""
    model = small_model(4)
    config = load_config("demo", [f"align.objective={objective}", "align.strategy=shallow"])
    aligner = Aligner(config, model, {"speech": 5}, torch.device("cpu"))

    def losses(given: Batch, keys: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        t = philox_uniform(keys[0], 1)[:, 0]
        out = model(given.mel, t, given.condition, capture=aligner.layers(0), pooled=aligner.pools(0))
        return aligner.losses(out.hidden, given, t, None, 0), flow_loss(out.v, given.mel, given.condition.lengths)

    graphed = graphs.GraphedLosses(lambda: [*model.parameters(), *aligner.parameters()], 1, lambda line: None)
    found = []
    for weights in ((0.9, 0.1), (0.2, 0.8)):
        aligner.select(LayerSelection("foga", {"speech": (1, 2)}, {"speech": weights}))
        found.append(graphed(losses, batch(), keys(0), aligner.variant(0))[1]["align_loss"])
        torch.testing.assert_close(found[-1], losses(batch(), keys(0))[0]["align_loss"].detach())
    assert len(captures) == 2
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize(
    "objective",
    [name if name in ("haste", "sra") else pytest.param(name, marks=pytest.mark.drill) for name in OBJECTIVES],
)
def test_replays_of_every_objective(objective, captures):
    """Losses and gradients of a second batch, with other targets of every kind, are those without a graph."""
    model, layers = small_model(4), (1, 2)
    options = [f"align.objective={objective}", "align.strategy=shallow"]
    aligner = Aligner(load_config("demo", options), model, {"speech": 5}, torch.device("cpu"))
    aligner.select(LayerSelection("shallow", {"speech": layers}, {"speech": (0.7, 0.3)}))

    def targets(seed: int) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        counts = torch.tensor([6, 0, 2])  # the second clip is not of this domain
        frames = TeacherFrames(torch.randn(3, 6, 5, generator=draw).half(), counts)
        attention = torch.randn(3, 6, 2, 2, 3, 5, generator=draw).half()  # two layers, queries and keys, heads, width
        averaged = {layer: torch.randn(3, 37, 32, generator=draw) for layer in aligner.averaged_layers(0)}
        given = {"teacher_frames": {"speech": frames}, "attention": {"speech": attention}, "averaged": averaged}
        return replace(batch(seed=seed), **given)

    def losses(given: Batch, keys: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        t = philox_uniform(keys[0], 1)[:, 0]
        taps = {"capture": aligner.layers(0), "pooled": aligner.pools(0), "attention": aligner.attention_layers(0)}
        out = model(given.mel, t, given.condition, **taps)
        found = aligner.losses(out.hidden, given, t, None, 0, out.attention)
        return found, flow_loss(out.v, given.mel, given.condition.lengths)

    step = SimpleNamespace(
        parameters=lambda: [*model.parameters(), *aligner.parameters()], losses=losses, aligns=aligner.variant(0)
    )
    graphed = graphs.GraphedLosses(step.parameters, 1, lambda line: None)
    seen = []
    for number in range(2):
        with force_backend("reference"):  # the stand-in records operators alone: not the fused loss of frames
            assert_equals_eager(step, graphed, targets(number), number)
            seen.append(losses(targets(number), keys(number))[0]["align_loss"].item())
    assert len(captures) == 1
    assert abs(seen[0] - seen[1]) > 1e-4


@pytest.mark.parametrize(
    ("stage", "ranks", "extra", "zero"),
    [
        (0, 1, (), {}),
        pytest.param(2, 2, ("train.accumulation=2",), {}, marks=pytest.mark.drill),
        # Buckets that are full before a backward pass ends: their hooks ask whether it is a step's last.
        (2, 2, ("train.accumulation=2",), {"reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}),
        pytest.param(
            1,
            2,
            ("train.accumulation=2",),
            {"reduce_bucket_size": 1000, "overlap_comm": True},
            marks=pytest.mark.drill,
        ),
    ],
)
def test_training_with_graphs_gives_the_same_curve(stage, ranks, extra, zero, preset, baseline, tmp_path):
    """DeepSpeed gets every gradient through its own hooks; heads are made amid the run."""
    values = ds_values(stage)
    values["zero_optimization"] |= zero
    (tmp_path / "zero.json").write_text(json.dumps(values))
    given = ("--ds_config", "zero.json", "--preset", str(preset), "run.dir=run", "train.graphs=1", *extra)
    output = run_training(ranks, *given, cwd=tmp_path, plant=plant_captures)
    assert output.count("captured, 1 of at most 1 batch shapes") == 2  # once with the heads of the layers chosen
    assert f"CUDA graphs: 2 captured, {5 * (1 if stage == 0 else 2)} replays" in output
    assert_same_curve(baseline, tmp_path / "run")


def test_a_failed_capture_advises_the_setting_of_training(monkeypatch):
    refuse_captures(monkeypatch)
    step = Step()
    graphed = graphs.GraphedLosses(step.parameters, 2, lambda line: None)
    with pytest.raises(UserError) as refusal:
        graphed(step.losses, batch(), keys(0), ())
    assert str(refusal.value) == (
        "train.graphs: the step cannot be captured (operation not permitted); train.graphs=0 runs without CUDA graphs"
    )


def test_a_cpu_and_zero_3_have_no_graphs():
    for kind, stage, where in (("cpu", 2, "on a cpu"), ("cuda", 3, "under ZeRO-3")):
        with pytest.raises(UserError, match=f"train.graphs=2: there are no CUDA graphs {where}"):
            graphs.check_graphs(TrainConfig(graphs=2), torch.device(kind), stage)
        graphs.check_graphs(TrainConfig(), torch.device(kind), stage)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures on a GPU")
def test_real_graphs():
    step = Step()
    step.model.cuda()
    step.head.cuda()
    graphed = graphs.GraphedLosses(step.parameters, 2, lambda line: None)
    for number in range(4):
        given, step_keys = batch((37, 29)[number % 2], number).to(torch.device("cuda")), keys(number).cuda()
        total, losses, _ = graphed(step.losses, given, step_keys, (True,))
        replayed, (wanted, _) = gradients(step, total), step.losses(given, step_keys)
        torch.testing.assert_close(losses["flow_loss"], wanted["flow_loss"].detach(), atol=1e-5, rtol=1e-4)
        for mine, theirs in zip(replayed, gradients(step, sum(wanted.values())), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
        del total, wanted  # their graphs belong to another stream than that of the next capture
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.mul_(1.1)


def test_graphs_are_the_default_where_shapes_are_few(preset, baseline, tmp_path):
    """One rank captures, the other cannot and runs each step as it comes: gradients are the same, in the same order."""
    given = ("--ds_config", "zero2.json", "--preset", str(preset), "train.accumulation=2")
    output = run_training(2, *given, "run.dir=run", cwd=tmp_path, plant=plant_few_shapes_on_rank_0)
    assert "captured, 1 of at most 2 batch shapes" in output
    assert_same_curve(baseline, tmp_path / "run")
    assert "graphs: null" in (tmp_path / "run" / "config.yaml").read_text()  # a resume decides again


def test_an_objective_that_may_choose_in_python_is_not_captured(preset, tmp_path):
    lines = ("from agrepa_fast import Objective", "class Mine(Objective):", "    tap = 'pooled'")
    lines += ("    def loss(self, head, tap, target, mask, t):", "        return tap.square().mean(-1)")
    (tmp_path / "mine.py").write_text("\n".join(lines))
    given = ("--ds_config", "zero2.json", "--preset", str(preset), "align.objective=mine:Mine", "run.dir=run")
    assert "captured" not in run_training(1, *given, "train.steps=4", cwd=tmp_path, plant=plant_few_shapes)


def test_a_head_with_a_frozen_part_trains_captured(preset, tmp_path):
    """Both of its parts begin as the identity."""
    (tmp_path / "mine.py").write_text(FROZEN)
    given = ("--ds_config", "zero2.json", "--preset", str(preset), "align.objective=mine:Frozen", "run.dir=run")
    given += ("align.strategy=shallow", "train.steps=3", "train.warmup_steps=0", "align.lr=0.1", "train.graphs=1")
    assert "captured, 1 of" in run_training(1, *given, cwd=tmp_path, plant=plant_captures)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step00000003" / "heads.safetensors")
    live, frozen = (saved[f"heads.speech_L1.{part}.weight"] for part in (0, 1))
    assert torch.equal(frozen, torch.eye(len(frozen)))
    assert not torch.equal(live, torch.eye(*live.shape))


def test_a_default_capture_that_fails_costs_one_line(preset, baseline, tmp_path):
    given = ("--ds_config", "zero2.json", "--preset", str(preset))
    output = run_training(1, *given, "run.dir=run", cwd=tmp_path, plant=plant_failing_captures)
    line = "rank 0: the step cannot be captured (out of memory): training goes on without CUDA graphs"
    assert output.count("cannot be captured") == output.count(line) == 1
    assert_same_curve(baseline, tmp_path / "run")


@pytest.mark.parametrize(
    ("device", "stage", "train", "buckets", "shapes"),
    [
        ("cuda", 2, {}, [(100, 8), (200, 4)], 2),
        ("cuda", 2, {}, [(100, 9), (200, 4)], 3),  # 9 clips over 4 parts: micro-batches of 2 and of 3
        ("cuda", 2, {}, [(100 * k, 8) for k in range(1, 10)], 0),
        ("cuda", 3, {}, [(100, 8)], 0),
        ("cpu", 2, {}, [(100, 8)], 0),
        ("cuda", 2, {"compile": True}, [(100, 8)], 0),
        ("cuda", 2, {"activation_checkpointing": True}, [(100, 8)], 0),
    ],
)
def test_shapes_are_counted_over_all_ranks(device, stage, train, buckets, shapes):
    plan = SimpleNamespace(fixed_shapes=True, buckets=[SimpleNamespace(frames=f, clips=c) for f, c in buckets])
    for rank in range(2):
        layout = BatchLayout(None, 2, rank, 2)
        given = (TrainConfig(**train), torch.device(device), stage)
        assert graphs.count_shapes(True, *given, plan, layout) == shapes
        assert graphs.count_shapes(False, *given, plan, layout) == 0
        of_any_length = SimpleNamespace(fixed_shapes=False, buckets=plan.buckets)
        assert graphs.count_shapes(True, *given, of_any_length, layout) == 0
