"""Every alignment objective in real steps: two ranks at ZeRO 0 to 3 train as one rank does."""

import pytest
import torch

from agrepa_fast.alignment.registry import OBJECTIVES

from ..ranks import call_on_ranks
from ..testing import write_small_shards
from .objectives_on_ranks import curves

STAGES = dict.fromkeys(OBJECTIVES, (2,)) | {"sra": (0, 2, 3)}  # sra swaps the averaged weights in and out


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(objective, stage) -> what one rank alone saw at stage 0, and each of two ranks."""
    folder = tmp_path_factory.mktemp("objectives")
    preset = str(write_small_shards(folder / "shards", teacher_rate=200.0))
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
