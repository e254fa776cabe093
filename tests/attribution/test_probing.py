"""Probes over fixed clips: spread over ranks, combined clip by clip, the same numbers on any number of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.attribution.foga import foga
from agrepa_fast.attribution.official import official_foga
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.attribution.scores import BatchScores
from agrepa_fast.config import ModelConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.batch import collate
from agrepa_fast.data.index import load_index
from agrepa_fast.data.reading import fixed_clips, read_shard
from agrepa_fast.errors import UserError
from agrepa_fast.flow import reference_prefix
from agrepa_fast.kernels import flow_mix
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.probing import probe as probe_module
from agrepa_fast.probing.fixed_clips import FixedClips
from agrepa_fast.probing.measure import official_probe
from agrepa_fast.probing.probe import ClipProbe
from agrepa_fast.probing.stored import pooled_states, storage_scores
from agrepa_fast.seeds import clip_keys

from ..ranks import run_ranks
from ..testing import write_small_shards
from ..training.graphs_on_ranks import refuse_captures

CONFIG = load_config(
    "demo", ["probe.times=[0.3,0.7]", "probe.draws=2", "model.dim=16", "model.heads=2", "model.token_dim=16"]
)


def fixed(index, split: str, per_domain: int, chunk: int, rank: int = 0, world: int = 1, **options) -> FixedClips:
    config = replace(CONFIG, probe=replace(CONFIG.probe, chunk=chunk))
    return FixedClips(index, split, per_domain, config, "cpu", rank, world, **options)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure") / "shards"
    write_small_shards(folder)
    return load_index(folder)


@pytest.fixture
def model(index):
    return small_dit(index)


def small_dit(index) -> AudioDiT:
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 3, "heads": 2, "token_dim": 16, "n_mels": index.n_mels, "vocab": index.vocab}
    made = AudioDiT(ModelConfig(**sizes, position="rotary_conv", time_scale=1000.0))
    for block in made.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.2)
    return made


def test_more_ranks_than_clips_are_refused(index):
    with pytest.raises(UserError, match="2 val clips are fewer than the 3 ranks"):
        fixed(index, "val", 1, 4, 0, 3)


def test_probe_clips_come_from_every_length_bucket_by_its_share(tmp_path):
    write_small_shards(tmp_path / "bucketed", (13, 19, 25))
    bucketed = load_index(tmp_path / "bucketed")
    clips = fixed(bucketed, "train", 9, 4)
    for domain in bucketed.domains:
        shards = bucketed.shards("train", domain)
        first = {bound: next(s for s in shards if s.bucket == bound) for bound in (13, 19, 25)}
        chosen = [sample for sample in clips.samples if sample.domain == domain]
        assert len(chosen) == 9
        for below, bound in ((0, 13), (13, 19), (19, 25)):
            of_bucket = [sample.key for sample in chosen if below < sample.frames <= bound]
            share = sum(s.clips for s in shards if s.bucket == bound) / bucketed.clips("train", domain)
            assert abs(len(of_bucket) - 9 * share) < 1
            assert of_bucket == [s.key for s in read_shard(first[bound], bucketed)][: len(of_bucket)]
    longest = [sample.frames > 13 for sample in fixed(bucketed, "train", 1, 4).samples]
    assert longest == [False, True]  # half of the speech clips, and a fifth of the audio clips, have up to 13 frames


@pytest.mark.parametrize("count", [1, 9, 22])
def test_probe_clips_of_one_bucket_are_the_first_in_shard_order(count, index):
    keys = [s.key for d in index.domains for s in fixed_clips(index, "train", d, 22)]
    wanted = [s.key for d in index.domains for shard in index.shards("train", d) for s in read_shard(shard, index)]
    assert keys == wanted
    chosen = [s.key for s in fixed(index, "train", count, 4).samples]
    assert chosen == wanted[:count] + wanted[22 : 22 + count]


@pytest.mark.parametrize("one_shape", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_clip_is_answered_for_once(world, one_shape, index):
    """one_shape, as CUDA graphs need: full chunks, padded alike. Every rank has the same number of chunks."""
    owned, shapes, chunks = [], set(), set()
    for rank in range(world):
        made = list(fixed(index, "train", 5, 4, rank, world, one_shape=one_shape).chunks())
        chunks.add(len(made))
        for batch, of_rank in made:
            owned += [place for _, place in of_rank]
            assert all(batch.places[row] == place for row, place in of_rank)
            shapes.add((batch.mel.shape, batch.condition.tokens.shape, batch.condition.padded))
    assert sorted(owned) == list(range(10))
    assert len(chunks) == 1
    assert len(shapes) == 1 or not one_shape


@pytest.mark.parametrize("options", [{}, {"measure": "foga-vjp"}, {"kind": "branch"}], ids=str)
def test_ranks_add_up_to_one(options, index, model):
    """Without a process group nothing is summed, so that each rank's share shows."""
    one = ClipProbe(model, fixed(index, "train", 5, 4), **options).launch(7).read()
    parts = [ClipProbe(model, fixed(index, "train", 5, 2, rank, 3), **options).launch(7).scores for rank in range(3)]
    for part in parts:
        assert any(not clip.any() for clip in part.values.unbind(1))
    torch.testing.assert_close(sum(part.values for part in parts), one.values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sum(part.floor for part in parts), one.floor, atol=1e-5, rtol=0)
    assert one.step == 7
    assert one.clips("audio") == 5


def test_a_clips_place_decides_its_noise_and_its_scores(index, model):
    clips = fixed(index, "train", 5, 4)
    scores = ClipProbe(model, clips).launch().read()
    place = 6  # the second audio clip, alone
    batch = collate([clips.samples[place]], (place,), index)
    reference = (0.5 * CONFIG.flow.max_reference * batch.condition.lengths).long().clamp(min=1)
    condition = replace(batch.condition, reference=reference_prefix(batch.mel, reference))
    alone = foga(model, ProbeBatch(batch.mel, condition, batch.domain, (place,)), times=(0.3, 0.7), draws=2)
    torch.testing.assert_close(scores.values[:, place], alone.values[:, 0], atol=1e-5, rtol=1e-4)


def test_the_floor_is_kept(index, model, monkeypatch):
    part = BatchScores(torch.ones(3, 4, 2, 2), torch.full((4,), 0.25), torch.zeros(4, dtype=torch.bool))
    stand_in = SimpleNamespace(launch=lambda batch: part, points=ProbePoints((0.3, 0.7), 2))
    monkeypatch.setattr(probe_module, "FogaProbe", lambda *_, **__: stand_in)
    clips = fixed(index, "val", 4, 4)
    assert ClipProbe(model, clips).launch().read().floor.tolist() == [0.25] * 8


def test_a_failure_is_raised_when_the_scores_are_read_and_names_the_clip(index, model):
    clips = fixed(index, "train", 5, 4)
    torch.nn.init.zeros_(model.out.weight)
    torch.nn.init.zeros_(model.out.bias)
    pending = ClipProbe(model, clips).launch()
    with pytest.raises(ValueError, match="probe clip 0: the model's velocity is zero"):
        pending.read()


def test_a_failed_capture_advises_the_setting_of_the_probe(index, model, monkeypatch):
    refuse_captures(monkeypatch)
    clips = fixed(index, "train", 5, 4, one_shape=True)
    message = r"^the probe cannot be captured \(operation not permitted\): probe.graph=false runs it"
    with pytest.raises(ValueError, match=message):
        ClipProbe(model, clips).launch().read()


def test_the_official_probe_takes_the_first_clip_of_each_domain(index, model):
    clips = fixed(index, "train", 5, 4)
    scores = official_probe(model, clips, step=3)
    assert scores.domain.tolist() == [0, 1]
    assert scores.step == 3
    for domain, place in ((0, 0), (1, 5)):
        for batch, _ in clips.chunks():
            if place in batch.places:
                row = slice(batch.places.index(place), batch.places.index(place) + 1)
                one = ProbeBatch(batch.mel[row], batch.condition[row], batch.domain[row], (place,))
        wanted = official_foga(model, one).values
        got = scores.values[:, scores.domain == domain]
        torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("recipe", ["corrected", "official"])
def test_pooled_states_by_hand(recipe, index, model):
    """One clip's states by a forward of its own, at FoG-A's x_t or at the clean mel; ranks add up to one."""
    states = pooled_states(model, fixed(index, "train", 5, 4), 9, recipe=recipe)
    parts = [pooled_states(model, fixed(index, "train", 5, 3, rank, 2), recipe=recipe) for rank in range(2)]
    torch.testing.assert_close(sum(part.hidden for part in parts), states.hidden, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sum(part.teacher["audio"] for part in parts), states.teacher["audio"])
    assert states.times == ((0.8,) if recipe == "official" else (0.3, 0.7))
    clips, place = fixed(index, "train", 5, 4), 3
    batch = next(batch for batch, _ in clips.chunks() if place in batch.places)
    row = batch.places.index(place)
    for number, t in enumerate(states.times):
        times = torch.full((len(batch.places),), t)
        x_t = batch.mel
        if recipe == "corrected":
            x_t, _ = flow_mix(batch.mel, times, clip_keys(0, 0, batch.places, f"foga {t:g}"), CONFIG.flow.sigma)
        hidden = model.eval()(x_t, times, batch.condition, capture=(2,)).hidden[2]
        length = int(batch.condition.lengths[row])
        torch.testing.assert_close(states.hidden[1, place, number], hidden[row, :length].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(states.teacher["speech"][place], batch.teacher["speech"][row])
    scores = storage_scores(states, {domain: torch.eye(16)[:5] for domain in index.domains}, ["ridge"])
    assert (scores[0].measure, scores[0].step) == ("ridge", 9)


def test_lasp_is_left_out_where_the_projections_do_not_fit(index, model):
    states = pooled_states(model, fixed(index, "train", 8, 4))
    fitting = {"speech": torch.randn(5, 16), "audio": torch.randn(7, 16)}
    narrow = states._replace(condition=F.pad(states.condition, (0, 1)))
    for given, projections, wanted in (
        (states, fitting, ["ridge", "cka", "lasp"]),
        (states, {"speech": fitting["speech"]}, ["ridge", "cka"]),
        (narrow, fitting, ["ridge", "cka"]),
    ):
        assert [scores.measure for scores in storage_scores(given, projections)] == wanted
    with pytest.raises(ValueError, match="D = 16, D_tok = 17"):
        storage_scores(narrow, fitting, ["lasp"])


FAILING_RANK = """
import sys
from pathlib import Path
import torch
from tests.attribution.test_probing import fixed, small_dit
from agrepa_fast.data.index import load_index
from agrepa_fast.zero.process_group import join_process_group
from agrepa_fast.probing.probe import ClipProbe
from agrepa_fast.probing.stored import pooled_states

join_process_group()
rank, index = torch.distributed.get_rank(), load_index(Path(sys.argv[1]))
model, calls = small_dit(index), []

def out_of_memory(*_):
    calls.append(0)
    if rank == 1 and len(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory")

model.blocks[1].register_forward_pre_hook(out_of_memory)
clips = fixed(index, "train", 5, 2, rank, 2)
probe = ClipProbe(model, clips)
for measure in (lambda: probe.launch().read(), lambda: pooled_states(model, clips)):
    calls.clear()
    try:
        measure()
    except ValueError as error:
        print("refused:", error, flush=True)
total = torch.ones(1)
torch.distributed.all_reduce(total)  # the ranks are still in step
print("in step:", int(total), bool(probe.launch().read().values.all()), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # left to the interpreter's exit, its threads now and then abort
"""


def test_a_rank_that_runs_out_of_memory_fails_the_probe_on_all(index, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING_RANK)
    outputs = run_ranks(2, tmp_path / "failing.py", str(index.folder))
    for output in outputs:
        assert output.count("refused: CUDA out of memory") == 2, output
        assert "in step: 2 True" in output
