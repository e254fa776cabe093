"""Choices that are undecided, and choices that are made again while training goes on."""

import json
from dataclasses import asdict
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.data.index import load_index
from agrepa_fast.probing.fixed_clips import probe_clips

from ..ranks import call_on_ranks
from ..testing import write_small_shards
from .choice import Choice


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refresh") / "shards"
    write_small_shards(folder)
    return folder


@pytest.fixture(scope="module")
def index(shards):
    return load_index(shards)


def test_refresh_measures_again_and_stop_ends_it(index, tmp_path):
    made = Choice(index, tmp_path, "align.refresh=3", "align.stop=14", "train.steps=50")
    assert made.run(range(1, 21)) == [7, 10, 13]
    assert made.measured(tmp_path) == [2, 4, 6, 9, 12]
    assert "the same layers with new weights" in made.said[-1]
    assert json.loads((tmp_path / "selection.json").read_text())["step"] == 12
    assert made.aligner.layers(13) == (0, *made.aligner.selection.all_layers)
    assert made.aligner.layers(14) == (0,)


def test_a_stop_before_any_choice_is_said(index, tmp_path):
    made = Choice(index, tmp_path, "align.stop=4", "align.k=3", "probe.confidence=0.9999", "train.steps=50")
    assert made.run(range(1, 9)) == []
    assert made.said[-1] == "step 4: align.stop=4 came before any layers were chosen: nothing was aligned"


def probe(means, step):
    """LayerScores of 16 clips per domain whose scores spread about the means by 0.1."""
    noise = torch.randn(len(means), 2, 16, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean(2, keepdim=True)).reshape(len(means), 32, 1, 1)
    values = torch.tensor(means)[:, None, None, None] + 0.1 * noise
    return LayerScores(values, torch.zeros(32), torch.tensor([0] * 16 + [1] * 16), (0.5,), step=step)


def test_a_run_changes_its_layers_only_if_the_evidence_says_so(index, tmp_path):
    made, chosen = Choice(index, tmp_path, "align.refresh=2", "train.steps=50"), []
    for step, second in ((6, 0.49), (8, 0.51), (10, 0.6)):
        made.choice.pending = probe([0.5, second, 0.2, 0.1], step)
        made.choice.read_pending()
        chosen.append(made.aligner.selection.layers["audio"])
    assert chosen == [(1,), (1,), (2,)]
    said = [line.partition(": ")[2].partition(":")[0] for line in made.said if "warning" not in line]
    assert said == ["aligned from here on", "the same layers with new weights", "chosen again, heads kept of none"]


UNSURE = ("align.k=3", "probe.confidence_floor=1")


def test_an_undecided_choice_is_warned_of_once(index, tmp_path):
    made = Choice(index, tmp_path, *UNSURE, "align.refresh=2", "train.steps=50")
    assert made.run(range(1, 12)) == [7, 9, 11]
    (warning,) = [line for line in made.said if "warning" in line]
    assert warning.startswith("step 6: warning: the Top-K cannot be told from the next layers: its probability is ")
    assert "chosen again" not in "".join(made.said)


def test_an_undecided_choice_is_refused_where_asked(index, tmp_path):
    made = Choice(index, tmp_path, *UNSURE, "probe.undecided=refuse", "train.steps=50")
    assert made.run(range(1, 10)) == []
    assert [line.partition(":")[0] for line in made.said] == ["step 2", "step 4", "step 6", "step 8"]
    assert "foga does not rank yet: the Top-K cannot be told from the next layers" in made.said[-1]
    decided = Choice(index, tmp_path, "align.k=4", *UNSURE[1:], "probe.undecided=refuse")
    assert decided.run(range(1, 10)) == [7]


@pytest.mark.parametrize("undecided", ["warn", "refuse"])
def test_a_refresh_that_is_undecided_keeps_the_layers_and_renews_the_weights(undecided, index, tmp_path):
    arguments = ("align.k=2", "align.refresh=2", "train.steps=50", f"probe.undecided={undecided}")
    made, chosen = Choice(index, tmp_path, *arguments), []
    for step, second, third in ((6, 0.6, 0.3), (8, 0.48, 0.50)):  # L3 leads L2 with less than 0.9
        made.choice.pending = probe([0.9, second, third, 0.1], step)
        made.choice.read_pending()
        chosen.append(made.aligner.selection)
    assert [one.layers["audio"] for one in chosen] == [(1, 2), (1, 2)]
    assert [one.step for one in chosen] == [6, 8]
    assert chosen[1].weights["audio"] == pytest.approx((0.9 / 1.38, 0.48 / 1.38))
    assert chosen[0].warning is None
    assert chosen[1].evidence["audio"]["top_k_probability"] < 0.5
    assert chosen[1].warning.endswith("; speech L2, audio L2 stayed: no other layer scores higher with probability 0.9")


def test_one_clip_decides_nothing_where_an_undecided_choice_is_refused(index, tmp_path):
    """A step counts as a clip of gradnorm, and there is one at the end of the warm-up."""
    arguments = ("align.strategy=gradnorm", "probe.pool=2", "probe.undecided=refuse", "probe.start_step=6")
    made = Choice(index, tmp_path, *arguments)
    made.choice._norms = torch.tensor([0.3, 0.1, 0.4, 0.2])
    assert made.run(range(1, 12)) == [9]
    assert made.said[0].startswith("step 6: gradnorm does not rank yet: one clip says nothing about others")


def count_block_forwards(made) -> tuple[int, int]:
    """The block forwards of one clip that the next probe runs, and those of a training step, its backward as two."""
    rows, handles = [], []
    for block in made.model.blocks:
        handles.append(block.attn.qkv.register_forward_hook(lambda _, args, __: rows.append(len(args[0]))))
    made.choice.pending = made.choice._launch(8)
    for handle in handles:
        handle.remove()
    return sum(rows), 3 * made.config.train.batch_clips * len(made.model.blocks)


@pytest.mark.parametrize("strategy", ["foga", "foga-vjp", "lasp", "gradnorm"])
def test_measuring_again_costs_half_a_per_cent_of_training_if_asked(strategy, index, tmp_path):
    made = Choice(index, tmp_path, f"align.strategy={strategy}", "align.refresh=null", "probe.times=[0.3,0.7]")
    made.choice._norms = torch.ones(4)
    probe, step = count_block_forwards(made)
    probe *= 3 if strategy == "foga-vjp" else 1  # with its backward
    assert made.choice.refresh == max(2, -(-200 * probe // step))
    assert strategy == "gradnorm" or 0.0049 < probe / made.choice.refresh / step <= 0.005


def test_the_cost_of_measuring_again_is_reported(index, tmp_path):
    made = Choice(index, tmp_path, "align.refresh=3", "train.steps=50")
    made.run(range(1, 8))
    # 6 clips x (1 time x 10 block forwards + 4 for the floor), of 8 clips x 4 blocks x 3
    assert made.said[-1].endswith("; measured again every 3 steps, 29.2% of training's block forwards")


def choose_on_rank(folder, overrides):
    """The choice of a rank, and that of a single process over the same clips."""
    index = load_index(folder)
    alone, shared = Choice(index, None, *overrides), Choice(index, None, *overrides)
    rank, world = dist.get_rank(), dist.get_world_size()
    shared.choice.clips = probe_clips(index, shared.config, "cpu", rank, world)
    shared.run(range(1, 12))
    with mock.patch.object(dist, "is_initialized", return_value=False):
        alone.run(range(1, 12))
    return [asdict(made.aligner.selection) for made in (shared, alone)]


def test_two_ranks_choose_what_one_chooses(shards):
    overrides = [*UNSURE[:1], "align.choice=soft", "probe.pool=3", "align.refresh=2", "train.steps=50"]
    (first, alone), (second, _) = call_on_ranks(2, choose_on_rank, shards, overrides)
    assert first == second
    assert first["step"] == alone["step"] == 10
    assert first["layers"] == alone["layers"]
    assert first["weights"]["audio"] == pytest.approx(alone["weights"]["audio"], abs=1e-5)
