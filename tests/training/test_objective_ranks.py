"""Every alignment objective in real steps: two ranks at every ZeRO stage train as one rank does."""

import pytest
import torch
from safetensors.torch import load_file

from agrepa_fast.alignment.registry import OBJECTIVES

from ..ranks import call_on_ranks, run_training
from ..testing import TEACHER_DIMS, metrics, write_small_shards
from .objectives_on_ranks import curves

STAGES = dict.fromkeys(OBJECTIVES, (0, 1, 2, 3))


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    """Shards with the teacher's frames, some more than mel frames, and with its attention."""
    folder = tmp_path_factory.mktemp("frames") / "shards"
    return str(write_small_shards(folder, teacher_rate=200.0, attention=(1, 2, 3, 4)))


@pytest.fixture(scope="module")
def found(preset, tmp_path_factory):
    """(objective, stage) -> what one rank alone saw at stage 0, and each of two ranks."""
    folder = tmp_path_factory.mktemp("objectives")
    (alone,) = call_on_ranks(1, curves, preset, folder / "alone", dict.fromkeys(OBJECTIVES, (0,)))
    return alone, call_on_ranks(2, curves, preset, folder / "two", STAGES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_train_as_one_at_every_stage(name, found):
    alone, ranks = found
    wanted = alone[name, 0]
    assert all(step["train/align_loss"] > 0 for step in wanted["losses"])
    for stage in STAGES[name]:
        first, second = (rank[name, stage] for rank in ranks)
        assert first["back"]
        for part, weights in first["heads"].items():
            assert torch.equal(weights, second["heads"][part])
            torch.testing.assert_close(weights, wanted["heads"][part], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(first["losses"], wanted["losses"], strict=True):
            for loss in ("train/loss", "train/align_loss", "train/flow_loss"):
                assert ours[loss] == pytest.approx(theirs[loss], rel=1e-5, abs=1e-7), (stage, loss)


def test_a_run_reads_the_teachers_frames_and_saves_their_heads(preset, tmp_path):
    options = (
        "align.objective=frames",
        "align.strategy=shallow",
        "train.steps=1",
        "train.val_every=9",
        "probe.clips=1",
    )
    run_training(1, "--preset", preset, f"run.dir={tmp_path}/run", *options, cwd=tmp_path)
    assert metrics(tmp_path / "run")[1]["train/align_loss"] > 0
    heads = load_file(tmp_path / "run/checkpoints/step00000001/heads.safetensors")
    assert heads["heads.speech_L1.0.weight"].shape == (64, 32)
    assert heads["heads.audio_L2.4.weight"].shape == (TEACHER_DIMS["audio"], 64)
