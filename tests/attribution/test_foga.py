from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from agrepa_fast import Backbone, Layer, ablate, device, foga, select_layers
from agrepa_fast.attribution.foga import FogaProbe
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.kernels import flow_mix
from agrepa_fast.seeds import clip_keys

from ..testing import MEL_BINS, small_batch, small_model

POINTS = ProbePoints((0.2, 0.6), draws=2)


@torch.no_grad()
def naive_scores(model, batch: ProbeBatch, t: float, sigma: float = 0.5) -> torch.Tensor:
    """(L, C): one forward for each layer, with that block really left out of the model's list of blocks."""
    keys = clip_keys(0, 0, batch.places, f"foga {t:g}")
    times = torch.full((len(batch.places),), t)
    x_t, _ = flow_mix(batch.mel, times, keys, sigma)
    blocks = list(model.blocks)
    base = model(x_t, times, batch.condition).v
    scores = []
    for left_out in range(len(blocks)):
        model.blocks = torch.nn.ModuleList(block for number, block in enumerate(blocks) if number != left_out)
        v = model(x_t, times, batch.condition).v
        change = []
        for clip, length in enumerate(batch.condition.lengths.tolist()):
            a, b = v[clip, :length], base[clip, :length]
            change.append((a - b).norm() / (b.norm() + 1e-8))
        scores.append(torch.stack(change))
    model.blocks = torch.nn.ModuleList(blocks)
    return torch.stack(scores)


@pytest.mark.parametrize("position", ["rotary_conv", "sinusoidal"])
def test_equals_really_skipping_each_block(position, probe_batch):
    model = small_model(depth=5, position=position).eval()
    scores = foga(model, probe_batch, times=(0.2, 0.7))
    assert scores.values.shape == (5, 3, 2, 1)
    for number, t in enumerate((0.2, 0.7)):
        torch.testing.assert_close(
            scores.values[:, :, number, 0], naive_scores(model, probe_batch, t), atol=1e-5, rtol=1e-5
        )


def test_runs_l_l_plus_1_over_2_block_forwards_and_l_more_for_the_floor(probe_batch):
    model, rows = small_model(depth=6), []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    foga(model, probe_batch, times=(0.5,))
    assert sum(rows) == (21 + 6) * 3


def test_dropout_is_off_inside_and_the_mode_comes_back(probe_batch):
    model = small_model(dropout=0.5).train()
    a, b = foga(model, probe_batch, times=(0.5,)), foga(model, probe_batch, times=(0.5,))
    assert torch.equal(a.values, b.values)
    assert model.training
    with pytest.raises(RuntimeError):
        foga(model, probe_batch._replace(mel=probe_batch.mel[..., :-1]), times=(0.5,))
    assert model.training


def test_padding_does_not_change_a_score(probe_batch):
    model = small_model()
    dirty = probe_batch.mel.clone()
    dirty[1, 20:] = 100
    a, b = (foga(model, probe_batch._replace(mel=mel), times=(0.5,)).values for mel in (probe_batch.mel, dirty))
    assert torch.equal(a, b)


def test_a_clips_score_does_not_depend_on_the_other_clips(probe_batch):
    model = small_model()
    together = foga(model, probe_batch, times=(0.3,), draws=2)
    one = ProbeBatch(probe_batch.mel[1:2], probe_batch.condition[1:2], probe_batch.domain[1:2], (1,))
    torch.testing.assert_close(
        foga(model, one, times=(0.3,), draws=2).values, together.values[:, 1:2], atol=1e-5, rtol=1e-5
    )


def test_statistics_by_hand(probe_batch):
    scores = foga(small_model(), probe_batch, times=(0.3, 0.6), draws=2)
    speech = scores.values[:, [0, 2]].mean((2, 3))
    torch.testing.assert_close(scores.mean("speech"), speech.mean(1))
    torch.testing.assert_close(scores.stderr("speech"), (speech[:, 0] - speech[:, 1]).abs() / 2)
    assert scores.stderr("audio").isinf().all()  # one clip
    torch.testing.assert_close(scores.mean_at("audio")[:, 1], scores.values[:, 1, 1].mean(-1))
    assert scores.domains() == ("speech", "audio")
    assert not torch.isclose(scores.values[..., 0], scores.values[..., 1]).any()  # other noise


def test_modules_modes_and_the_random_state_come_back(probe_batch):
    model = small_model(dropout=0.5).train()
    model.blocks[1].eval()  # a frozen part
    model.register_forward_hook(lambda *_: torch.rand(1) and None)  # a model that draws
    before = torch.get_rng_state()
    foga(model, probe_batch, times=(0.5,))
    assert torch.equal(torch.get_rng_state(), before)
    assert [block.training for block in model.blocks] == [True, False, True, True]


def test_scores_that_mean_nothing_are_refused(probe_batch):
    model = small_model()
    model.blocks[2].ffn.fc2.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="probe clip 0, layer 1: the score is not finite"):
        foga(model, probe_batch, times=(0.5,))
    model = small_model()
    torch.nn.init.zeros_(model.out.weight)
    torch.nn.init.zeros_(model.out.bias)
    with pytest.raises(ValueError, match="probe clip 0: the model's velocity is zero"):
        foga(model, probe_batch, times=(0.5,))


def test_official_recipe_feeds_the_clean_mel_at_0_8(probe_batch):
    model, seen = small_model(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    scores = foga(model, probe_batch, recipe="official")
    assert torch.equal(seen[0][0][:3], probe_batch.mel)
    assert seen[0][1].tolist() == pytest.approx([0.8] * 3)
    assert scores.times == (0.8,)


def test_other_gates(probe_batch):
    """A pair of layers and half a layer, against the same done naively."""
    model = small_model(depth=4)
    gates = torch.tensor([[1, 1, 1, 1], [1, 0.5, 1, 1], [0, 0, 1, 1]])  # not in the order in which they run
    scores = foga(model, probe_batch, times=(0.5,), gates=gates)
    assert scores.values.shape[0] == 2
    keys = clip_keys(0, 0, probe_batch.places, "foga 0.5")
    times = torch.full((3,), 0.5)
    x_t, _ = flow_mix(probe_batch.mel, times, keys, 0.5)
    with torch.no_grad():
        base = model(x_t, times, probe_batch.condition).v
        blocks = model.blocks
        model.blocks = blocks[2:]
        pair = model(x_t, times, probe_batch.condition).v
        model.blocks = blocks
        blocks[1].register_forward_hook(lambda module, args, out: args[0] + 0.5 * (out - args[0]))
        half = model(x_t, times, probe_batch.condition).v
    for row, v in enumerate((half, pair)):
        wanted = (v - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)
        torch.testing.assert_close(scores.values[row, :, 0, 0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", [0, 1])
def test_attention_and_ffn_apart_equal_the_blocks_own_gates(part, probe_batch):
    """kind="branch" against block(..., gate=(N, 2)) for one branch of one block after the other."""
    model = small_model(depth=3)
    scores = foga(model, probe_batch, times=(0.4,), kind="branch")
    assert scores.layer_names() == ("L1.attn", "L1.ffn", "L2.attn", "L2.ffn", "L3.attn", "L3.ffn")
    t = torch.full((3,), 0.4)
    x_t = flow_mix(probe_batch.mel, t, clip_keys(0, 0, probe_batch.places, "foga 0.4"), 0.5)[0]
    with torch.no_grad():
        base = model(x_t, t, probe_batch.condition).v
        for layer, block in enumerate(model.blocks):
            gate = torch.ones(3, 2)
            gate[:, part] = 0
            block.forward = partial(block.forward, gate=gate)
            v = model(x_t, t, probe_batch.condition).v
            del block.forward
            wanted = (v - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)
            assert wanted.min() > 1e-3
            torch.testing.assert_close(scores.values[2 * layer + part, :, 0, 0], wanted, atol=1e-5, rtol=1e-5)


class TestGraphs:
    """Where CUDA graphs are captured, on a CPU with a stand-in that has their rules: the operations of one call, on the
    same buffers, without Python."""

    @pytest.fixture
    def captures(self, monkeypatch):
        made = []

        def capture(call, pool, warmup=2):
            for _ in range(warmup):
                call()
            with torch.no_grad():
                operations = make_fx(lambda: call())()
            made.append(pool)
            return lambda: operations() and None

        monkeypatch.setattr(device, "captured", capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
        return made

    def batches(self):
        for seed in (1, 2):
            mel, condition = small_batch((37, 20, 11 + seed), seed=seed)
            yield ProbeBatch(mel, condition, torch.tensor([0, 1, 0]), (3 * seed, 3 * seed + 1, 3 * seed + 2))

    def assert_equals_foga(self, probe, model):
        for batch in self.batches():
            measured, wanted = probe.launch(batch), foga(model, batch, times=(0.2, 0.6), draws=2)
            torch.testing.assert_close(measured.values, wanted.values, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(measured.floor, wanted.floor, atol=1e-6, rtol=0)
            assert not measured.silent.any()

    def test_replays_are_of_live_weights_and_new_clips(self, captures):
        model = small_model()
        probe = FogaProbe(model, POINTS, graph=True)
        self.assert_equals_foga(probe, model)
        for parameter in model.parameters():  # an optimizer's step, or load_state_dict
            parameter.data.mul_(1.1)
        self.assert_equals_foga(probe, model)
        assert len(captures) == 2  # the variants, and the plain forward, in one pool
        assert captures[0] is captures[1]

    def test_weights_that_have_moved_are_captured_again(self, captures):
        model = small_model()
        probe = FogaProbe(model, POINTS, graph=True)
        next(iter(self.batches()))
        self.assert_equals_foga(probe, model)
        model.blocks[1].ffn.fc1.weight.data = 2 * model.blocks[1].ffn.fc1.weight.data
        self.assert_equals_foga(probe, model)
        assert len(captures) == 4

    def test_conditions_that_are_there_or_not_are_programs_of_their_own(self, captures):
        model, given = small_model(), next(iter(self.batches()))
        probe = FogaProbe(model, POINTS, graph=True)
        dropped = replace(given.condition, keep_tokens=torch.tensor([True, False, True]))
        for condition in (dropped, given.condition, dropped):
            batch = given._replace(condition=condition)
            wanted = foga(model, batch, times=(0.2, 0.6), draws=2)
            torch.testing.assert_close(probe.launch(batch).values, wanted.values, atol=1e-6, rtol=1e-5)
        assert len(captures) == 4

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="captures on a GPU")
    def test_real_graphs(self):
        model = small_model().cuda()
        probes = [FogaProbe(model, POINTS, graph=graph) for graph in (True, False)]
        for _ in range(2):
            for given in self.batches():
                batch = given._replace(mel=given.mel.cuda(), condition=given.condition.to("cuda"))
                replayed, eager = (probe.launch(batch) for probe in probes)
                torch.testing.assert_close(replayed.values, eager.values, atol=1e-6, rtol=1e-4)
            for parameter in model.parameters():
                parameter.data.mul_(1.1)

    def test_the_training_mode_comes_back_when_a_capture_fails(self, captures, monkeypatch):
        model = small_model().train()

        def fails(*_):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(device, "captured", fails)
        probe = FogaProbe(model, POINTS, graph=True)
        with pytest.raises(RuntimeError, match="capturing"):
            probe.launch(next(iter(self.batches())))
        assert model.training
        assert all("forward" not in block.__dict__ for block in model.blocks)


def test_gates_without_the_whole_model_are_refused(probe_batch):
    model, gates = small_model(), torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 1]])
    inputs = {"x_t": probe_batch.mel, "t": torch.full((3,), 0.5), "condition": probe_batch.condition}
    for call in (
        lambda: foga(model, probe_batch, gates=gates),
        lambda: ablate(model, inputs, model.blocks, gates=gates),
    ):
        with pytest.raises(ValueError, match="first row of gates is the whole model"):
            call()


def test_a_velocity_that_is_zero_at_a_later_time_is_refused(probe_batch):
    model = small_model()
    model.register_forward_hook(
        lambda module, args, out: out._replace(v=out.v * (args[1] < 0.6).view(-1, 1, 1).repeat(len(args[0]) // 3, 1, 1))
    )
    foga(model, probe_batch, times=(0.2, 0.5))
    with pytest.raises(ValueError, match="velocity is zero"):
        foga(model, probe_batch, times=(0.2, 0.7))


def test_a_model_that_mixes_clips_is_refused_by_the_blocks_name(probe_batch):
    model = small_model()
    block = model.blocks[2]
    forward = block.forward
    block.forward = lambda *args, **kwargs: (out := forward(*args, **kwargs)) + 0.1 * out.mean(0)
    with pytest.raises(ValueError, match=r"block 3 \(GatedDiTBlock\) cannot be gated exactly"):
        foga(model, probe_batch, times=(0.5,))


class Biased(torch.nn.Module):
    """A block with a bias of rows x heads, and its context first."""

    def __init__(self, dim):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)

    def forward(self, context, x, bias):
        bias = bias.view(x.shape[0], -1, x.shape[1], x.shape[1]).mean(1)
        return x + torch.tanh(self.linear(x) + 0.1 * (bias @ x) + context)


class ThirdParty(Backbone):
    def __init__(self, dim=8, heads=4):
        super().__init__()
        self.heads, self.enter, self.leave = heads, torch.nn.Linear(MEL_BINS, dim), torch.nn.Linear(dim, MEL_BINS)
        self.blocks = torch.nn.ModuleList(Biased(dim) for _ in range(4))

    @property
    def layers(self):
        return [Layer((block,), width=8) for block in self.blocks]

    def velocity(self, x_t, t, condition):
        x = context = self.enter(x_t)
        bias = (context @ context.mT).repeat_interleave(self.heads, 0)
        for block in self.blocks:
            x = block(context.roll(1, 1), x, bias)
        return self.leave(x)


class TestBackbonesOfOthers:
    def test_what_cannot_be_told_is_refused_in_the_first_pass(self, probe_batch):
        torch.manual_seed(0)
        with pytest.raises(ValueError, match=r"block 1 \(Biased\): its state could be 'context' or 'x'"):
            foga(ThirdParty(), probe_batch, times=(0.5,))

    def test_rows_that_are_not_told_by_their_number(self, probe_batch):
        torch.manual_seed(0)
        model = ThirdParty()
        model.state = "x"
        with pytest.raises(ValueError, match=r"ThirdParty: which arguments .* set ThirdParty.row_arguments and state"):
            foga(model, probe_batch, times=(0.5,))
        with pytest.raises(ValueError, match="ThirdParty: which arguments"):
            FogaProbe(model, POINTS).check_blocks(probe_batch)
        model.row_arguments = ("context", "bias")
        scores = foga(model, probe_batch, times=(0.5,))
        torch.testing.assert_close(scores.values[..., 0, 0], one_by_one(model, probe_batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def one_by_one(model, batch: ProbeBatch, t: float = 0.5) -> torch.Tensor:
    """(L, C): one forward per block, which hands on its state as it got it."""
    times = torch.full((len(batch.places),), t)
    x_t, _ = flow_mix(batch.mel, times, clip_keys(0, 0, batch.places, f"foga {t:g}"), 0.5)
    base, scores = model(x_t, times, batch.condition).v.flatten(1), []
    for block in model.blocks:
        block.forward = lambda context, x, bias: x
        scores.append((model(x_t, times, batch.condition).v.flatten(1) - base).norm(dim=1) / base.norm(dim=1))
        del block.forward
    return torch.stack(scores)


class TestOfficialRecipe:
    """The release's probe, faults included (models.py, fog_attribution)."""

    def test_odd_layers_only(self, probe_batch):
        scores = foga(small_model(depth=5), probe_batch, recipe="official")
        assert scores.mean("speech").isnan().tolist() == [False, True, False, True, False]
        assert scores.evidence()["audio"]["mean"][1] is None
        chosen = select_layers(scores, k=2)
        assert set(chosen.layers["speech"]) <= {1, 3, 5}
        with pytest.raises(ValueError, match="3 of 5"):
            select_layers(scores, k=4)

    def test_a_score_that_is_not_finite_is_refused_by_its_layer(self, probe_batch):
        model, calls = small_model(depth=5), []

        def break_the_fourth(module, args, out):  # the whole model, then without L1, L3 and L5
            calls.append(out)
            return out._replace(v=out.v * torch.nan) if len(calls) == 4 else out

        model.register_forward_hook(break_the_fourth)
        with pytest.raises(ValueError, match="probe clip 0, layer 5: the score is not finite"):
            foga(model, probe_batch, recipe="official")

    def test_dropout_differs_between_the_passes(self, probe_batch):
        steady, dropped = (foga(small_model(dropout=p), probe_batch, recipe="official") for p in (0.0, 0.5))
        assert steady.floor_of("speech") < 2e-4  # sqrt(1e-8) over the energy
        assert dropped.floor_of("speech") > 0.05
