"""AdamW and Muon over ranks and stages: torch's own on whole weights, skipped steps, resume, and what Muon takes."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agrepa_fast.config import TrainConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.models.backbone import Backbone, Layer
from agrepa_fast.zero.masters import Piece
from agrepa_fast.zero.muon import Matrices, Orthogonalizer, orthogonalize
from agrepa_fast.zero.optimizers import Layout, RuledOptimizer
from agrepa_fast.zero.rules import Rule, muon_rules

from ..ranks import call_on_ranks
from .optimizers_on_ranks import by_torch, follow_all, recut_without_updates, resume, save_and_go_on, time_embedding

ONE = [(stage, optimizer, ()) for optimizer in ("adamw", "muon") for stage in range(4)]
TWO = [*ONE, (0, "muon", ("train.precision=bf16",)), (2, "muon", ("train.precision=bf16",))]
CASES = [(ranks, case) for ranks, cases in ((1, ONE), (2, TWO)) for case in cases]
MATRICES = {"attn.qkv.weight": 3, "attn.out.weight": 1, "ffn.fc1.weight": 1, "ffn.fc2.weight": 1}
MATRICES |= {"time.mlp.0.weight": 1, "time.mlp.2.weight": 1}


@pytest.fixture(scope="module")
def followed(preset, tmp_path_factory) -> dict:
    """What each rank saw, by ranks and case."""
    found = {}
    for ranks, cases in ((1, ONE), (2, TWO)):
        everywhere = call_on_ranks(ranks, follow_all, str(preset), tmp_path_factory.mktemp("followed"), cases)
        found |= {(ranks, case): seen for case, *seen in zip(cases, *everywhere, strict=True)}
    return found


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=str)
def test_weights_are_those_of_torchs_optimizers(ranks, case, followed, monkeypatch):
    """torch's Muon always iterates in bf16, ours in a bf16 run: for the others its cast is left out here."""
    bf16 = bool(case[2])
    if not bf16:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    found = followed[ranks, case][0]
    names = {name: re.sub(r"^blocks\.\d+\.", "", name) for name in found["before"]}
    matrices = {name: MATRICES[own] for name, own in names.items() if case[1] == "muon" and own in MATRICES}
    assert len(matrices) == (4 * 4 + 2 if case[1] == "muon" else 0)
    undecayed = {name for name, weight in found["before"].items() if weight.ndim < 2 or "embed" in name}
    assert any(found["before"][name].ndim == 2 for name in undecayed)
    for name, weight in by_torch(found, matrices, undecayed).items():
        if bf16 and name in matrices:  # both round the iterations' products, in batches and one by one
            assert (found["after"][name] - weight).norm() < 2**-6 * (weight - found["before"][name]).norm(), name
        else:
            torch.testing.assert_close(found["after"][name], weight, atol=2e-6, rtol=2e-5, msg=f"{name} {case}")
        assert not torch.equal(weight, found["before"][name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_curves_are_the_same_on_any_ranks_at_any_stage(optimizer, followed):
    curves = {key: seen[0]["losses"] for key, seen in followed.items() if key[1][1:] == (optimizer, ())}
    assert len(curves) == 8
    for case, losses in curves.items():
        assert losses == pytest.approx(curves[1, (0, optimizer, ())], rel=1e-5), case


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=str)
def test_update_ratio_and_a_step_that_is_not_finite(ranks, case, followed):
    for found in followed[ranks, case]:
        assert found["unmoved"] == 0  # before the first update
        assert found["ratios"][0] == pytest.approx(found["ratios"][1], rel=1e-3)
        assert found["skipped"]


def test_muon_goes_on_with_other_ranks_and_stages(preset, tmp_path):
    """From whole moments, and with DeepSpeed's own files."""
    two, one = tmp_path / "two", tmp_path / "one"
    saved = {(2, s): found for s, found in call_on_ranks(2, save_and_go_on, str(preset), two, [1, 2, 3])[0].items()}
    saved |= {(1, s): found for s, found in call_on_ranks(1, save_and_go_on, str(preset), one, [0])[0].items()}

    def again(ranks, *cases):
        given = [
            ((two if of == 2 else one) / f"stage{at}", at, saved[of, at]["counters"], stage, (of, at) == (ranks, stage))
            for of, at, stage in cases
        ]
        found = call_on_ranks(ranks, resume, str(preset), tmp_path / f"again{ranks}", given)[0]
        for case, went_on in zip(cases, found, strict=True):
            uninterrupted = saved[case[:2]]
            same = (ranks, case[2]) == case[:2]  # then every bit is
            assert went_on["losses"] == pytest.approx(uninterrupted["losses"], rel=0 if same else 1e-5, abs=0), case
            for name, weight in uninterrupted["weights"].items():
                bound = {"atol": 0 if same else 1e-4, "rtol": 0, "msg": f"{name} {case}"}
                torch.testing.assert_close(went_on["weights"][name], weight, **bound)

    again(2, (2, 3, 3), (2, 3, 0), (1, 0, 3), (2, 2, 1), (2, 1, 1))
    again(1, (2, 2, 0), (2, 3, 2), (1, 0, 0), (2, 1, 3))


def test_a_checkpoint_before_the_first_update_has_no_moments(preset, tmp_path):
    (moments,) = call_on_ranks(1, recut_without_updates, str(preset), tmp_path / "run")
    assert moments
    assert all((state["exp_avg"] == 0).all() and state["step"] == 0 for state in moments)


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 5, 8), (2, 4, 16)])
def test_the_iterations_make_matrices_about_orthogonal_for_the_stated_flops(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        found = orthogonalize(x)
    assert counter.get_total_flops() == Matrices(*shape).flops == Matrices(shape[0], shape[2], shape[1]).flops
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    values = left.mT @ found @ right.mT  # the singular vectors stay
    torch.testing.assert_close(values, torch.diag_embed(values.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)
    assert 0.5 < values.diagonal(dim1=1, dim2=2).min() <= values.max() < 1.3
    assert orthogonalize(torch.zeros(shape)).abs().sum() == 0


def test_each_parameter_is_iterated_once_and_the_work_is_spread(monkeypatch):
    """Eight alike, a quarter of each on every of four ranks, as under ZeRO-3; and one that two ranks share unequally,
    as at stages 1 and 2."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    shapes = dict.fromkeys(range(8), Matrices(1, 8, 8))
    held = [[Piece(number, 16 * rank, 16) for number in shapes] for rank in range(4)]
    owners = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        made = Orthogonalizer(shapes, held, shared=True, device=torch.device("cpu"), dtype=torch.float32)
        owners.append(made.owners)
    assert all(found == owners[0] for found in owners)
    assert sorted(owners[0].values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    uneven = [[Piece(0, 0, 10)], [Piece(0, 10, 54)], [], []]
    made = Orthogonalizer({0: shapes[0]}, uneven, shared=True, device=torch.device("cpu"), dtype=torch.float32)
    assert made.owners == {0: 1}
    with pytest.raises(UserError, match="mics_shard_size"):
        Orthogonalizer({0: shapes[0]}, [*uneven[:2], uneven[1], []], shared=True, device=None, dtype=None)


class Mine(Backbone):
    """A user's model, of the parts that models have."""

    def __init__(self):
        super().__init__()
        self.embed, self.into = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)
        self.time_embed = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8))
        block = torch.nn.ModuleDict({"attn_norm": torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 16)})})
        block["attn"] = torch.nn.MultiheadAttention(8, 2)
        block["to_kv"], block["conv"] = torch.nn.Linear(8, 16), torch.nn.Conv1d(8, 8, 3)
        block["time_modulation"] = torch.nn.Linear(8, 16)
        block["adaLN_modulation"], block["norm"] = torch.nn.Linear(8, 16), torch.nn.LayerNorm(8)
        self.block = block

    @property
    def layers(self):
        return [Layer((self.block,), 8)]


def test_muon_takes_the_matrices_of_the_layers_and_of_the_flow_time():
    model = Mine()
    rules = {name: muon_rules(model)[parameter] for name, parameter in model.named_parameters()}
    by_muon = {name: rule.matrices for name, rule in rules.items() if rule.matrices}
    of_time = {"time_embed.0.weight": 1, "time_embed.2.weight": 1}
    of_layers = {"block.attn.in_proj_weight": 3, "block.attn.out_proj.weight": 1, "block.to_kv.weight": 2}
    assert by_muon == of_time | of_layers
    decayed = {name for name, rule in rules.items() if rule == Rule(True)}
    assert decayed == {
        *("into.weight", "block.conv.weight", "block.attn_norm.linear.weight", "block.adaLN_modulation.weight"),
        "block.time_modulation.weight",
    }


@pytest.mark.parametrize(
    ("columns", "rows", "taken", "matrices"), [(8, 24, 8, 3), (8, 48, 16, 3), (8, 12, 8, 1), (16, 24, 16, 1)]
)
def test_queries_and_fewer_keys_in_one_weight_are_one_matrix(columns, rows, taken, matrices):
    """Of 8 columns: of one size, of more heads than the model is wide, of two queries per key; of 16 the last again."""
    model = Mine()
    attention = torch.nn.ModuleDict({"qkv": torch.nn.Linear(columns, rows), "out": torch.nn.Linear(taken, columns)})
    model.block["self_attn"] = attention
    assert muon_rules(model)[attention["qkv"].weight].matrices == matrices


def test_a_matrix_that_a_parametrization_computes_stays_with_adamw():
    model = Mine()
    torch.nn.utils.parametrizations.weight_norm(model.block["to_kv"])
    torch.nn.utils.parametrizations.weight_norm(model.time_embed[0])
    rules = muon_rules(model)
    assert rules.keys() == {*model.parameters()}
    assert sum(rule.matrices for rule in rules.values()) == 1 + 3 + 1  # of time_embed.2, in_proj and out_proj
    RuledOptimizer(rules, TrainConfig())


def test_the_embedding_of_the_flow_time_keeps_its_size_at_muons_rate(preset, tmp_path):
    """AdamW drives it to 2.5 in these steps, and far below 0 in `demo-long`, where a SiLU is 0 for every t."""
    (embedding,) = call_on_ranks(1, time_embedding, str(preset), tmp_path / "run")
    assert embedding.abs().max() < 1
    assert torch.nn.functional.silu(embedding).std(0).mean() > 0.05  # over t: the blocks can tell times apart


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"train\.optimizer='moun': adamw or muon"):
        load_config("demo", ["train.optimizer=moun"])


def test_updates_reach_a_parameter_that_is_not_contiguous():
    parameter = torch.nn.Parameter(torch.randn(3, 4).T)
    optimizer = RuledOptimizer({parameter: Rule(decays=True)}, TrainConfig())
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert parameter.is_contiguous()  # it is updated through flat views
    assert parameter.shape == (4, 3)


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_master_that_is_part_of_a_matrix_has_both_moments_where_files_are_converted(partitioned):
    """DeepSpeed's converter reads both of every rank."""
    parameter = torch.nn.Parameter(torch.randn(8))
    optimizer = RuledOptimizer({parameter: Rule(matrices=1, decays=True)}, TrainConfig())
    optimizer.partitioned = partitioned
    optimizer.layouts = {parameter: Layout(parameter, [Piece(0, 0, 8)], [Rule(matrices=1, decays=True)])}
    optimizer.set_state(parameter, {"exp_avg": torch.ones(8)}, 3)
    assert ("exp_avg_sq" in optimizer.state[parameter]) is partitioned
