import json
import warnings
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from agrepa_fast.alignment import aligner as aligner_module
from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.alignment.bitc import BitcProjections, bitc_loss
from agrepa_fast.alignment.heads import AlignmentHeads
from agrepa_fast.alignment.losses import alignment_loss
from agrepa_fast.alignment.objective import Objective
from agrepa_fast.alignment.pooled import Pooled
from agrepa_fast.attribution.selection import LayerSelection, unmeasured_selection
from agrepa_fast.config import AlignConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.models.backbone import Layer

from ..testing import small_batch
from .choice import small_config

SELECTION = LayerSelection("foga", {"speech": (1, 3), "audio": (2,)}, {"speech": (0.75, 0.25), "audio": (1.0,)})
DIMS = {"speech": 5, "audio": 7}
WIDTHS = (32,) * 4
SIZES = SimpleNamespace(layers=[Layer((), width=16)] * 4, condition_width=16, parameters=nn.Linear(1, 1).parameters)


class HalfFrozen(Objective):
    """As a user may write it: a trained layer before a fixed random projection."""

    tap = "pooled"

    def head(self, width, target_width):
        return nn.Sequential(nn.Linear(width, 6), nn.Linear(6, target_width).requires_grad_(False))

    def loss(self, head, tap, target, mask, t):
        return 1 - F.cosine_similarity(head(tap), target, dim=-1)


def heads(seed: int = 0) -> AlignmentHeads:
    return AlignmentHeads(Pooled(), SELECTION, WIDTHS, DIMS, seed)


def teachers(rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, dim) for name, dim in DIMS.items()}


def loss_of(heads, hidden, teacher, domain, t):
    return alignment_loss(Pooled(), heads, hidden, SimpleNamespace(teacher=teacher, domain=domain), t)


def test_loss_by_hand():
    made, hidden = heads(), {layer: torch.randn(4, 32) for layer in (1, 2, 3)}
    teacher, domain = teachers(4), torch.tensor([0, 1, 0, 1])
    mean, loss = loss_of(made, hidden, teacher, domain, torch.rand(4))
    torch.testing.assert_close(mean, loss.mean())
    assert not loss.requires_grad
    for row in range(4):
        name = ("speech", "audio")[domain[row]]
        wanted = 0
        for layer, weight in zip(SELECTION.layers[name], SELECTION.weights[name], strict=True):
            h = hidden[layer][row]
            z = made.heads[f"{name}_L{layer}"](h / (h.square().mean() + 1e-6).sqrt())
            wanted += weight * (1 - F.cosine_similarity(z, teacher[name][row], dim=0))
        torch.testing.assert_close(loss[row], wanted)


def test_gradients_reach_the_selected_layers_and_their_blocks_only(model):
    mel, condition = small_batch()
    out = model(mel, torch.full((3,), 0.5), condition, capture=(1, 2, 3), pooled=True)
    loss_of(heads(), out.hidden, teachers(3), torch.tensor([0, 1, 0]), torch.rand(3))[0].backward()
    reached = [
        block.ffn.fc1.weight.grad is not None and bool(block.ffn.fc1.weight.grad.any()) for block in model.blocks
    ]
    assert reached == [True, True, True, False]  # L4 lies above the deepest selected layer


def test_an_absent_domain_gives_exact_zeros():
    made, hidden = heads(), {layer: torch.randn(4, 32, requires_grad=True) for layer in (1, 2, 3)}
    teacher = teachers(4)
    teacher["audio"] = torch.zeros(4, 7)
    loss_of(made, hidden, teacher, torch.zeros(4, dtype=torch.long), torch.rand(4))[0].backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == ("speech" in name)
    assert torch.equal(hidden[2].grad, torch.zeros(4, 32))


def test_heads_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    a = heads()
    torch.manual_seed(2)
    b = heads()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    other = AlignmentHeads(Pooled(), LayerSelection("fixed:3", {"speech": (3,)}, {"speech": (1.0,)}), WIDTHS, DIMS, 0)
    assert torch.equal(other.heads["speech_L3"][0].weight, a.heads["speech_L3"][0].weight)
    assert not torch.equal(a.heads["speech_L1"][0].weight, a.heads["speech_L3"][0].weight)
    assert not torch.equal(heads(seed=1).heads["speech_L1"][0].weight, a.heads["speech_L1"][0].weight)


def test_flow_times_may_be_a_view(monkeypatch):
    """Of torch's warnings about one, the first of a process is shown."""
    rows = {domain: ((0.2,) * len(layers), (0.4,) * len(layers)) for domain, layers in SELECTION.layers.items()}
    made = AlignmentHeads(Pooled(), replace(SELECTION, times=(0.2, 0.8), weights_at=rows), WIDTHS, DIMS, 0)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = made.layer_weights("speech", torch.tensor([[0.5, 0.0], [0.8, 0.0]])[:, 0])
    torch.set_warn_always(always)
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.4]] * 2))


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (("align.k=3",), 3),
        (("align.k=3", "align.choice=soft"), 6),
        (("align.k=3", "align.per_time=true", "probe.times=[0.3,0.7]"), 6),
        (("align.k=7", "align.choice=soft"), 8),
        (("align.share=0.5",), 5),
        (("align.share=1.0",), 8),
        (("align.strategy=fixed:2,5", "align.k=3"), 2),
        (("align.strategy=none",), 0),
    ],
)
def test_a_dry_run_has_as_many_heads_as_may_be_chosen(overrides, count):
    """Of 8 layers."""
    model = SimpleNamespace(**{**vars(SIZES), "layers": SIZES.layers * 2})
    made = Aligner(load_config("demo", overrides), model, DIMS, torch.device("cpu"))
    assert len(made.trial_layers) == count


def test_bitc_by_hand():
    """weight (1 - cos(P layer_norm(c), y)), the mean over all clips; dropped tokens count nothing, exactly."""
    projections, weights = BitcProjections(6, DIMS, 0), {"speech": 0.5, "audio": 1.0}
    assert torch.allclose(projections["speech"].weight @ projections["speech"].weight.T, torch.eye(5), atol=1e-6)
    pooled, teacher, domain = torch.randn(4, 6, requires_grad=True), teachers(4), torch.tensor([0, 1, 0, 1])
    kept = torch.tensor([True, True, False, True])
    loss = bitc_loss(projections, weights, pooled, teacher, domain, kept)
    wanted = 0
    for row in (0, 1, 3):
        name, c = ("speech", "audio")[domain[row]], pooled[row]
        normed = (c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt()
        z = projections[name].weight @ normed
        wanted += weights[name] * (1 - z @ teacher[name][row] / (z.norm() * teacher[name][row].norm()))
    torch.testing.assert_close(loss, wanted / 4)
    loss.backward()
    assert [bool(row.any()) for row in pooled.grad] == [True, True, False, True]


def test_bitc_of_an_absent_domain_gives_exact_zeros():
    projections, pooled = BitcProjections(6, DIMS, 0), torch.zeros(2, 6, requires_grad=True)
    teacher = teachers(2) | {"audio": torch.zeros(2, 7)}
    kept = torch.tensor([False, False])
    bitc_loss(projections, {"speech": 0.5, "audio": 1.0}, pooled, teacher, torch.zeros(2).long(), kept).backward()
    for parameter in (pooled, *projections.parameters()):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_bitc_trains_the_token_embedding_and_no_block(model):
    mel, condition = small_batch()
    pooled = model(mel, torch.full((3,), 0.5), condition, capture=(0,), pooled=True).hidden[0]
    projections = BitcProjections(24, DIMS, 0)
    bitc_loss(projections, {"speech": 1.0, "audio": 1.0}, pooled, teachers(3), torch.tensor([0, 1, 0]), None).backward()
    assert model.tokens.embedding.weight.grad.any()
    assert all(p.grad is None for p in model.blocks.parameters())


def test_weights_that_differ_by_time_are_those_of_each_clips_time():
    by_time = replace(
        SELECTION,
        times=(0.2, 0.6),
        weights_at={"speech": ((1.0, 0.0), (0.5, 0.5)), "audio": ((1.0,), (2.0,))},
    )
    made, hidden, teacher = (
        AlignmentHeads(Pooled(), by_time, WIDTHS, DIMS, 0),
        {k: torch.randn(4, 32) for k in (1, 2, 3)},
        teachers(4),
    )
    domain, t = torch.tensor([0, 1, 0, 1]), torch.tensor([0.1, 0.3, 0.5, 0.9])
    _, losses = loss_of(made, hidden, teacher, domain, t)
    wanted = {0: {1: 1.0, 3: 0.0}, 1: {2: 1.25}, 2: {1: 0.625, 3: 0.375}, 3: {2: 2.0}}  # clip -> layer -> lambda
    for row, weights in wanted.items():
        name, expected = ("speech", "audio")[domain[row]], 0
        for layer, weight in weights.items():
            h = hidden[layer][row]
            z = made.heads[f"{name}_L{layer}"](h / (h.square().mean() + 1e-6).sqrt())
            expected += weight * (1 - F.cosine_similarity(z, teacher[name][row], dim=0))
        torch.testing.assert_close(losses[row], expected)


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [("fixed:4,2,2", (2, 4)), ("shallow", (1, 2, 3)), ("deep", (6, 7, 8)), ("none", None)],
)
def test_unmeasured_strategies(strategy, layers):
    chosen = unmeasured_selection(AlignConfig(strategy=strategy), 8, ("speech", "audio"), seed=0)
    if layers is None:
        assert chosen.all_layers == ()
        return
    assert chosen.layers == {"speech": layers, "audio": layers}
    assert sum(chosen.weights["audio"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("depth", "k", "layers"),
    [(8, 2, (4, 5)), (7, 3, (3, 4, 5)), (8, 3, (3, 4, 5)), (7, 2, (3, 4)), (7, 1, (4,)), (4, 4, (1, 2, 3, 4))],
)
def test_middle_layers_of_even_and_odd_models(depth, k, layers):
    chosen = unmeasured_selection(AlignConfig(strategy="middle", k=k), depth, ("speech",), seed=0)
    assert chosen.layers == {"speech": layers}
    assert layers[0] - 1 in (depth - layers[-1], depth - layers[-1] - 1), "as many layers on each side, or one fewer"


def test_random_layers_depend_on_the_seed():
    sets = {
        unmeasured_selection(AlignConfig(strategy="random"), 8, ("speech", "audio"), seed).layers["speech"]
        for seed in range(9)
    }
    assert len(sets) > 3
    assert all(len(set(layers)) == 3 and min(layers) >= 1 and max(layers) <= 8 for layers in sets)
    again = [unmeasured_selection(AlignConfig(strategy="random"), 8, ("speech",), 4).layers for _ in range(2)]
    assert again[0] == again[1]


def test_foga_needs_scores():
    with pytest.raises(UserError, match="needs a probe"):
        unmeasured_selection(AlignConfig(strategy="foga"), 8, ("speech",), 0)


def test_selection_survives_json(tmp_path):
    tables = {"speech": ((0.75, 0.25), (0.5, 0.5)), "audio": ((1.0,), (1.0,))}
    for selection in (SELECTION, replace(SELECTION, times=(0.2, 0.6), weights_at=tables)):
        selection.save(tmp_path / "selection.json")
        assert LayerSelection.from_dict(json.loads((tmp_path / "selection.json").read_text())) == selection


class TestHeads:
    def aligner(self, monkeypatch, *overrides):
        monkeypatch.setattr(aligner_module.dist, "get_world_size", lambda: 1)
        return Aligner(small_config(*overrides), SIZES, DIMS, torch.device("cpu"))

    def batch(self):
        torch.manual_seed(3)
        teacher = {domain: torch.randn(4, dim) for domain, dim in DIMS.items()}
        return SimpleNamespace(teacher=teacher, domain=torch.tensor([0, 1, 0, 1]))

    def hidden(self):
        torch.manual_seed(4)
        return {layer: torch.randn(4, 16) for layer in range(5)}

    def train(self, made, steps):
        for step in steps:
            losses = made.losses(self.hidden(), self.batch(), torch.rand(4), None, step)
            sum(losses.values()).backward()
            made.reduce(step)
            made.step(step)

    def selection(self, speech, audio):
        layers = {"speech": speech, "audio": audio}
        return LayerSelection("foga", layers, {domain: (1 / len(k),) * len(k) for domain, k in layers.items()})

    def test_heads_of_layers_that_stay_keep_weights_and_optimizer_state(self, monkeypatch):
        made = self.aligner(monkeypatch)
        made.select(self.selection((1, 2), (3,)))
        self.train(made, range(3))
        kept = made.heads.heads["speech_L2"]
        weights = [p.detach().clone() for p in kept.parameters()]
        moments = [made.optimizer.state[p]["exp_avg"].clone() for p in kept.parameters()]
        made.select(self.selection((2, 4), (3, 4)))
        assert set(made.heads.heads) == {"speech_L2", "speech_L4", "audio_L3", "audio_L4"}
        assert made.heads.heads["speech_L2"] is kept
        for parameter, weight, moment in zip(kept.parameters(), weights, moments, strict=True):
            assert torch.equal(parameter, weight)
            assert torch.equal(made.optimizer.state[parameter]["exp_avg"], moment)
            assert made.optimizer.state[parameter]["step"] == 3
        fresh = next(made.heads.heads["speech_L4"].parameters())
        assert fresh not in made.optimizer.state
        self.train(made, range(3, 5))
        assert made.optimizer.state[fresh]["step"] == 2
        assert made.optimizer.state[next(kept.parameters())]["step"] == 5

    def test_state_comes_back_in_whatever_order_layers_were_chosen(self, monkeypatch):
        made, other = self.aligner(monkeypatch), self.aligner(monkeypatch)
        made.select(self.selection((1, 2), (3,)))
        self.train(made, range(2))
        made.select(self.selection((2, 4), (1,)))
        self.train(made, range(2, 4))
        other.load_state_dict(deepcopy(made.state_dict()))
        for aligner in (made, other):
            self.train(aligner, range(4, 6))
        for a, b in zip(made.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_frozen_parts_of_a_head_stay_and_come_back(self, monkeypatch):
        monkeypatch.setattr(aligner_module, "make_objective", lambda *_: HalfFrozen())
        made, other = (self.aligner(monkeypatch, "align.lr=0.1", "train.warmup_steps=0") for _ in range(2))
        made.select(self.selection((1, 2), (3,)))
        before = deepcopy(made.heads.heads["speech_L2"])
        self.train(made, range(2))
        other.load_state_dict(deepcopy(made.state_dict()))
        for aligner in (made, other):
            self.train(aligner, range(2, 4))
        live, frozen = made.heads.heads["speech_L2"]
        assert not torch.equal(live.weight, before[0].weight)
        assert torch.equal(frozen.weight, before[1].weight)
        for a, b in zip(made.heads.parameters(), other.heads.parameters(), strict=True):
            assert torch.equal(a, b)
        _, trained = made.trial(self.hidden(), self.batch(), torch.rand(4), None)
        assert trained
        assert all(parameter.requires_grad for parameter in trained)

    def test_a_state_with_all_parameters_in_one_group_comes_back(self, monkeypatch):
        """As version 0.1 wrote it."""
        made, other = self.aligner(monkeypatch), self.aligner(monkeypatch)
        made.select(self.selection((1, 2), (3,)))
        self.train(made, range(2))
        state, old = made.state_dict(), torch.optim.AdamW(made.parameters())
        old.state.update(made.optimizer.state)
        other.load_state_dict(deepcopy(state | {"optimizer": old.state_dict()}))
        for a, b in zip(made.parameters(), other.parameters(), strict=True):
            assert torch.equal(made.optimizer.state[a]["exp_avg"], other.optimizer.state[b]["exp_avg"])

    def test_matrices_decay_and_biases_do_not(self, monkeypatch):
        made = self.aligner(monkeypatch, "train.weight_decay=0.5", "train.warmup_steps=0", "align.lr=0.1")
        made.select(self.selection((1,), (2,)))
        before = [parameter.detach().clone() for parameter in made.parameters()]
        for parameter in made.parameters():
            parameter.grad = torch.zeros_like(parameter)
        made.step(0)
        assert {parameter.ndim for parameter in before} == {1, 2}
        for parameter, old in zip(made.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), old if old.ndim < 2 else 0.95 * old)

    def test_the_warm_up_of_the_weight_begins_with_the_first_step_that_aligns(self, monkeypatch):
        """A probe is read a step after it."""
        made, factors = self.aligner(monkeypatch, "align.warmup_steps=4"), []
        made.begin(4)
        made.select(replace(self.selection((1,), (2,)), step=4))
        for step in (5, 6, 9):
            made.begin(step)
            factors.append(made._factor.item())
        assert factors == [0.25, 0.5, 1]

    def test_after_the_stop_heads_rest_and_bitc_goes_on(self, monkeypatch):
        made = self.aligner(monkeypatch, "align.strategy=shallow", "align.stop=2")
        made.select(self.selection((1,), (2,)))
        self.train(made, range(2))
        head, projection = next(made.heads.parameters()), made.bitc["speech"].weight
        before = head.detach().clone(), projection.detach().clone()
        losses = made.losses(self.hidden(), self.batch(), torch.rand(4), None, 2)
        assert losses["align_loss"] == 0
        self.train(made, range(2, 4))
        assert torch.equal(head, before[0])
        assert not torch.equal(projection, before[1])

    def test_the_weight_of_a_step_is_that_since_the_first_choice_also_after_another(self, monkeypatch):
        made, other = (self.aligner(monkeypatch, "align.decay=linear", "align.stop=20") for _ in range(2))
        made.select(replace(self.selection((1,), (2,)), step=4))
        made.select(replace(self.selection((1,), (3,)), step=10))
        other.load_state_dict(deepcopy(made.state_dict()))
        losses = []
        for aligner in (made, other):
            for step in (4, 12):
                aligner.begin(step)
                losses.append(aligner.losses(self.hidden(), self.batch(), torch.ones(4), None, step)["align_loss"])
        assert torch.equal(0.5 * losses[0], losses[1])
        assert losses[:2] == losses[2:]
