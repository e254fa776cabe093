"""Steps that are not finite: every rank leaves them out, whole, and goes on; and stops after too many."""

import json
from pathlib import Path

import pytest

from ..ranks import call_on_ranks
from .nonfinite_on_ranks import spoil_steps


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one(ranks, preset, tmp_path):
    everywhere = call_on_ranks(ranks, spoil_steps, str(preset), tmp_path)
    for found in everywhere:
        assert "2 steps in a row were not finite, up to step 2" in found.pop("stopped")
    losses = {}
    for name, found in everywhere[0].items():
        assert all(other[name]["changed"] == [] for other in everywhere), name
        assert min(found["moved"]) > 0, name  # the steps around it did what they are for
        assert found["rate"] == pytest.approx(0, abs=1e-9), name
        assert [step["train/skipped"] for step in found["metrics"]] == [0, 1, 0], name
        assert ["train/loss" in step for step in found["metrics"]] == [True, False, True], name
        losses[name] = [step.get("train/loss") for step in found["metrics"]]
        assert_written(tmp_path / name / "skipped.jsonl", ranks, named="-mel" in name)
    for name, values in losses.items():  # the same curve whatever skipped, and at which stage
        tolerance = 1e-5 if "fp32" in name else 0.05
        for value, wanted in zip(values[::2], losses["0-False-fp32-mel"][::2], strict=True):
            assert value == pytest.approx(wanted, abs=tolerance), name


def assert_written(path: Path, ranks: int, named: bool) -> None:
    (line,) = path.read_text().splitlines()
    line = json.loads(line)
    assert line["step"] == 2
    assert [rank["rank"] for rank in line["ranks"]] == list(range(ranks))
    clips = [key for rank in line["ranks"] for key in rank["clips"]]
    assert len(clips) == len(set(clips)) == 8
    bad = [rank["not_finite"] for rank in line["ranks"]]
    assert bad[:-1] == [[]] * (ranks - 1)
    assert len(bad[-1]) == named
    assert set(bad[-1]) <= set(line["ranks"][-1]["clips"])
