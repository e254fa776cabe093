"""Differences that must not look clear, and seeds whose clips differ."""

import json

import numpy as np
import pytest

from agrepa_fast.evaluation.compare import Difference, differences
from agrepa_fast.evaluation.intervals import Interval

from .test_compare import CLIPS, evaluated


def test_a_seed_compares_distances_of_the_clips_that_both_runs_have(tmp_path):
    """The arm's embeddings are the baseline's, of 18 of the 24 clips. A distance of fewer clips is another one."""
    arms = {"none": CLIPS, "fewer": CLIPS[:18]}
    runs = []
    for label, kept in arms.items():
        for seed in (0, 1, 2):
            run = evaluated(tmp_path / f"{label}{seed}", label, seed)
            file, results = run.folder / "embeddings.npz", run.folder / "results.json"
            arrays = dict(np.load(file))
            arrays["speech/sample"] = arrays["speech/sample"][: len(kept)] + seed
            np.savez(file, **arrays, **{"speech/sample/keys": np.array(kept)})
            summary = json.loads(results.read_text())
            for metric in ("mmd", "fad"):
                figure = {
                    "value": run.distances("speech").value(metric, arrays["speech/sample"]),
                    "low": None,
                    "high": None,
                    "n": len(kept),
                }
                summary["rows"]["sample"]["speech"][metric] = figure
            results.write_text(json.dumps(summary))
            runs.append(run)
    found = {one.metric: one for one in differences(runs, "none", 0.95)}
    for metric in ("mmd", "fad"):
        assert list(found[metric].of_seeds) == [0, 0, 0]
        assert (found[metric].value, found[metric].seeds.high, found[metric].p) == (0, 0, 1)


@pytest.mark.parametrize(
    ("clips", "seeds", "clear"),
    [
        ((0.01, 0.1), (0.01, 0.1), True),
        ((-0.1, -0.01), (-0.1, -0.01), True),
        ((1.1e-16, 0.1), (0.01, 0.1), False),  # an end at 0, by rounding beside it
        ((0.01, 0.1), (-0.1, -1e-16), False),
        ((0.01, 0.1), (0.0833, 0.0833), False),  # counts of 12 clips that agree
        ((0.01, 0.1), (float("nan"), float("nan")), False),
    ],
)
def test_a_clear_difference_excludes_0_by_more_than_rounding(clips, seeds, clear):
    over = [Interval(sum(ends) / 2, *ends, 3, "t") for ends in (clips, seeds)]
    assert Difference("foga", "speech", "wer", (), *over, None).clear == clear
