"""The strategy of a run: when layers are measured, when they are chosen, and that it survives a checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from agrepa_fast import device
from agrepa_fast.attribution.csv import read_csv
from agrepa_fast.attribution.selection import LayerSelection
from agrepa_fast.data.index import load_index
from agrepa_fast.errors import UserError
from agrepa_fast.models.backbone import Layer
from agrepa_fast.probing import schedule
from agrepa_fast.zero.gradients import gradient_norms

from ..testing import write_small_shards
from .choice import Choice, small_config


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choose") / "shards"
    write_small_shards(folder)
    return load_index(folder)


def test_probes_are_read_one_step_later_and_the_set_is_frozen(index, tmp_path):
    made = Choice(index, tmp_path)
    assert made.run(range(1, 3)) == []
    assert made.choice.pending is not None  # launched after step 2
    assert made.measured(tmp_path) == []  # and not read
    assert made.run(range(3, 13)) == [7]
    assert made.measured(tmp_path) == [2, 4, 6]
    assert made.aligner.selection.step == 6
    saved = json.loads((tmp_path / "selection.json").read_text())
    assert LayerSelection.from_dict(saved) == made.aligner.selection
    assert [line.partition(":")[0] for line in made.said] == ["step 2", "step 4", "step 6"]
    assert "rank correlation with the probe before: speech 1.00, audio 1.00" in made.said[1]


def test_the_first_probe_is_that_of_start_step(index, tmp_path):
    made = Choice(index, tmp_path, "probe.start_step=3")
    assert made.run(range(1, 9)) == [7]
    assert made.measured(tmp_path) == [3, 5, 6]


def test_an_early_decision_says_what_it_saved(index, tmp_path):
    made = Choice(index, tmp_path, "probe.confidence=0.1")
    assert made.run(range(1, 13)) == [3]
    assert made.measured(tmp_path) == [2]
    assert "decided early, 2 probes saved" in made.said[0]


def test_recent_probes_are_pooled(index, tmp_path):
    made = Choice(index, tmp_path, "probe.pool=2", "align.refresh=4", "train.steps=50")
    made.run(range(1, 7))
    assert [scores.step for scores in made.choice.probes] == [4]
    made.run([7])
    assert [scores.step for scores in made.choice.probes] == [6]
    made.run(range(8, 12))
    assert "rank correlation with the probe before" in made.said[-1]
    assert made.aligner.selection.evidence["speech"]["step"] == 10


def test_one_clip_is_never_sure_enough_to_decide_early(index, tmp_path):
    made = Choice(index, tmp_path, "probe.confidence=0.01", "probe.clips=1")
    assert made.run(range(1, 9)) == [7]
    assert "with probability unknown" in made.said[0]


def test_a_soft_choice_has_a_head_for_every_layer_that_may_be_in_the_top_k(index, tmp_path):
    made = Choice(index, tmp_path, "align.choice=soft", "align.k=3")
    made.run(range(1, 8))
    selection = made.aligner.selection
    assert selection.layers["speech"] == (1, 2, 3, 4)
    assert set(made.aligner.heads.heads) == {f"{d}_L{k}" for d, layers in selection.layers.items() for k in layers}
    for domain, weights in selection.weights.items():
        assert sum(weights) == pytest.approx(1)
        torch.testing.assert_close(made.aligner.heads.layer_weights(domain, torch.rand(3)), torch.tensor(weights))


def test_the_end_of_a_run_chooses_nothing(index, tmp_path):
    made = Choice(index, tmp_path, "probe.clips=8")
    made.run(range(1, 7))
    assert made.choice.pending is not None
    evidence = made.choice.finish(6)
    assert made.aligner.selection is None
    assert evidence["speech"]["step"] == 6
    assert not (tmp_path / "selection.json").exists()


@pytest.mark.parametrize("choice", ["hard", "soft"])
@pytest.mark.parametrize("strategy", ["foga", "foga-vjp", "lasp", "gradnorm"])
def test_a_checkpoint_between_launch_and_reading_changes_nothing(strategy, choice, index, tmp_path):
    arguments = (f"align.strategy={strategy}", "probe.pool=2", f"align.choice={choice}")
    whole = Choice(index, tmp_path / "a", *arguments)
    stopped = Choice(index, tmp_path / "b", *arguments)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    norms = torch.tensor([0.3, 0.1, 0.4, 0.2])
    for step in range(1, 9):
        for made in (whole, stopped):
            made.choice._norms = norms + 0.01 * step
            made.choice.after_step(step)
        if step in (4, 6):  # a probe is under way
            state = stopped.choice.state_dict()
            said = stopped.said
            stopped = Choice(index, tmp_path / "b", *arguments)
            stopped.said += said
            stopped.choice.load_state_dict(state)
    assert stopped.aligner.selection == whole.aligner.selection
    assert stopped.aligner.selection.strategy == strategy
    assert stopped.said == whole.said
    assert read_csv(tmp_path / "a" / "attribution.csv") == read_csv(tmp_path / "b" / "attribution.csv")


def test_a_probe_that_fails_costs_nothing(index, tmp_path):
    made = Choice(index, tmp_path)
    made.model.blocks[1].ffn.fc2.bias.data.fill_(float("nan"))
    before = torch.get_rng_state()
    assert made.run(range(1, 4)) == []
    assert made.said == [
        "step 2: the probe failed and training goes on: probe clip 0, layer 1: the score is not finite"
    ]
    assert made.choice.probes == []
    assert not list(tmp_path.iterdir())
    assert made.model.training
    assert torch.equal(torch.get_rng_state(), before)
    made.model.blocks[1].ffn.fc2.bias.data.zero_()
    assert made.run(range(4, 9)) == [7]


def test_a_full_disk_costs_a_probe_s_files_and_no_layer(index, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schedule, "append_csv", full)
    monkeypatch.setattr(LayerSelection, "save", full)
    made = Choice(index, tmp_path)
    assert made.run(range(1, 9)) == Choice(index, tmp_path / "other").run(range(1, 9)) != []
    for name in ("attribution.csv", "selection.json"):
        assert f"{name} could not be written (No space left on device); training goes on" in made.said


def test_a_file_that_another_program_wrote_costs_its_rows_and_no_layer(index, tmp_path):
    made = Choice(index, tmp_path)
    made.run(range(1, 4))
    (tmp_path / "attribution.csv").write_text((tmp_path / "attribution.csv").read_text().replace(",", ";"))
    assert made.run(range(4, 9)) == [7]
    (line, _) = [line for line in made.said if "could not be written" in line]
    assert line.startswith("attribution.csv could not be written (")
    assert line.endswith("move it away, or choose another folder); training goes on")


def test_captures_of_a_probe_are_reported(index, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "captured", lambda call, pool: call)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    made = Choice(index, tmp_path)
    made.choice.clips.one_shape = True
    made.run(range(1, 6))
    assert [line for line in made.said if "CUDA" in line] == ["step 2: the probe is captured as 2 CUDA graphs"]
    made = Choice(index, tmp_path / "other")
    made.choice.clips.one_shape, made.model.replayable = True, False  # a graph would repeat what its Python chose
    assert made.run(range(1, 9)) == [7]
    assert not [line for line in made.said if "CUDA" in line]


def test_three_probes_in_a_row_that_fail_end_the_run(index, tmp_path):
    made = Choice(index, tmp_path)
    bias = made.model.blocks[1].ffn.fc2.bias.data
    bias.fill_(float("nan"))
    made.run(range(1, 6))  # the probes of steps 2 and 4 fail
    bias.zero_()
    made.run([6])
    made.run([7])  # that of step 6 does not: it counts anew from here
    made.aligner.selection = None
    bias.fill_(float("nan"))
    made.run(range(8, 13))
    assert sum("the probe failed and training goes on" in line for line in made.said) == 4
    with pytest.raises(UserError, match=r"3 probes in a row failed, up to step 13: .*layer 1: .* not finite; .*foga"):
        made.run([13])
    made.aligner.selection = LayerSelection("foga", {"speech": (1,)}, {"speech": (1.0,)}, step=6)
    with pytest.raises(UserError, match=r"without them align\.refresh chooses no layers again; checkpoints are"):
        made.run([14])


def test_a_resume_counts_the_probes_that_failed_before_it(index, tmp_path):
    state = None
    for steps in (range(1, 6), range(6, 7)):  # the probes of steps 2 and 4 fail in the first
        made = Choice(index, tmp_path)
        made.model.blocks[1].ffn.fc2.bias.data.fill_(float("nan"))
        if state is not None:
            made.choice.load_state_dict(state)
        made.run(steps)
        state = made.choice.state_dict()
    with pytest.raises(UserError, match=r"3 probes in a row failed, up to step 7"):
        made.run([7])


@pytest.mark.parametrize("strategy", ["none", "fixed:1,3"])
def test_a_strategy_without_probes_is_not_ended_by_the_last_one(strategy, index, tmp_path):
    made = Choice(index, tmp_path, f"align.strategy={strategy}")
    made.choice.start(index.domains)
    made.model.blocks[1].ffn.fc2.bias.data.fill_(float("nan"))
    made.run(range(1, 21))
    assert made.said == []
    assert made.choice.finish(20) == {}
    assert "the probe failed" in made.said[0]


def test_a_model_that_is_asleep_goes_on_warming_up(index, tmp_path):
    made = Choice(index, tmp_path)
    for block in made.model.blocks:
        nn.init.zeros_(block.modulation.weight)
    assert made.run(range(1, 12)) == []
    assert "foga does not rank yet: speech: 0 of 4 layers" in made.said[-1]
    for block in made.model.blocks:
        nn.init.normal_(block.modulation.weight, std=0.2)
    assert made.run(range(12, 16)) == [13]


def test_the_end_of_a_run_measures_what_layers_contribute_and_store(index, tmp_path):
    made = Choice(index, tmp_path, "align.strategy=none", "probe.clips=8")
    made.choice.start(index.domains)
    evidence = made.choice.finish(20)
    assert evidence["speech"]["measure"] == "foga"
    rows = read_csv(tmp_path / "attribution.csv")
    assert {(row["measure"], row["step"]) for row in rows} == {(m, "20") for m in ("foga", "ridge", "cka", "lasp")}


def test_gradnorm_counts_a_step_as_a_clip(index, tmp_path):
    made = Choice(index, tmp_path, "align.strategy=gradnorm", "probe.pool=3", "align.k=2")
    for step in range(1, 8):
        made.choice._norms = torch.tensor([0.1, 0.4, 0.2, 0.3]) * 2.0**step  # their order is the same in all
        made.choice.after_step(step)
    selection = made.aligner.selection
    assert selection.layers == {"speech": (2, 4), "audio": (2, 4)}
    assert selection.evidence["audio"]["clips"] == 3
    assert selection.evidence["audio"]["mean"] == pytest.approx([2.8, 11.2, 5.6, 8.4])  # steps 2, 4 and 6


def test_a_layer_without_trained_parameters_has_no_gradient_to_rank():
    layers = [Layer((nn.Linear(2, 2, bias=False),), width=2) for _ in range(3)]
    layers[1].parts[0].requires_grad_(False)
    for number, layer in enumerate(layers):
        layer.parts[0].weight.grad = None if number == 1 else torch.full((2, 2), 1.0 + number)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0, bfloat16_enabled=lambda: False, device="cpu")
    assert gradient_norms(engine, layers).tolist() == [2, 0, 6]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["align.strategy=lasp", "model.token_dim=8"],
            "align.strategy=lasp: BiT-C's projection takes the token condition's",
        ),
        (["align.strategy=lasp", "align.bitc_audio=0"], "needs align.bitc_speech and align.bitc_audio above 0"),
        (["align.strategy=shallow", "align.refresh=3"], "align.refresh: shallow measures nothing"),
        (["align.strategy=gradnorm", "align.per_time=true"], "align.per_time: gradnorm has no score for each time"),
        (["align.strategy=deep", "align.share=0.5"], "align.share: deep has no scores"),
        (["align.strategy=deep", "align.choice=soft"], "align.choice=soft: deep has no scores"),
        (["align.share=0.5", "align.choice=soft"], "align.choice=soft weighs the Top-K: give align.k"),
        (["probe.clips=1", "align.choice=soft"], "align.choice=soft: probe.clips=1 shows no spread, raise it to 2"),
        (["align.strategy=gradnorm", "align.choice=soft"], "align.choice=soft: probe.pool=1 shows no spread"),
        (["align.strategy=gradnorm", "probe.undecided=refuse"], "probe.undecided=refuse: probe.pool=1 shows no spread"),
        (["probe.clips=1", "probe.undecided=refuse"], "probe.undecided=refuse: probe.clips=1 shows no spread"),
        (["align.choice=soft", "probe.undecided=refuse"], "probe.undecided=refuse: a soft choice is never undecided"),
        (["align.refresh=null", "train.batch_frames=900"], "align.refresh=null counts train.batch_clips per step"),
        (["align.strategy=deep", "align.refresh=null"], "align.refresh: deep measures nothing"),
        (["align.choice=sotf"], "align.choice='sotf': hard or soft"),
        (["align.share=1.5"], "align.share=1.5: must be in"),
        (["align.stop=-1"], "align.stop=-1"),
        (["align.stop=7"], "align.stop=7 comes before the layers are chosen: raise it above 7"),
        (["align.stop=7", "probe.confidence=0.9", "probe.clips=1"], "align.stop=7 comes before the layers are chosen"),
        (["align.stop=7", "probe.confidence=0.9", "align.strategy=gradnorm"], "align.stop=7 comes before the layers"),
        (["align.stop=3", "probe.confidence=0.9"], "align.stop=3 comes before the layers are chosen: raise it above 3"),
        (
            ["align.stop=5", "probe.confidence=0.9", "align.strategy=gradnorm", "probe.pool=2"],
            "align.stop=5 comes before the layers are chosen: raise it above 5",
        ),
        (["train.steps=7"], "probe.warmup_steps=6 leaves no step to align before train.steps=7: lower it, raise"),
        (["probe.times=[0.5,0.3]"], "must rise"),
        (["probe.times=[0.5,0.5]"], "must rise"),
        (["align.bitc_speech=-1"], "align.bitc_speech=-1: must not be negative"),
        (["probe.storage_clips=2"], "probe.storage_clips=2: at least 8"),
        (["align.strategy=foga-vpj"], "did you mean 'foga-vjp'"),
    ],
)
def test_settings_that_cannot_be(overrides, message):
    with pytest.raises(UserError, match=message):
        small_config(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["align.strategy=lasp", "align.choice=soft", "probe.clips=1"],  # LASP's clips are probe.storage_clips
        ["align.strategy=gradnorm", "probe.undecided=refuse", "probe.pool=2"],
        ["align.stop=4", "probe.confidence=0.9"],  # the probe of step 2 may decide, and step 3 aligns
        ["train.steps=8"],  # the probe of step 6 is read after step 7, and step 7, counted from 0, aligns
    ],
)
def test_settings_that_go_together(overrides):
    small_config(*overrides)
