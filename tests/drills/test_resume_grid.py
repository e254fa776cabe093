"""A part of the resume grid in which every stage and both rank counts are left and entered."""

import pytest

from .resume_grid import Layout, measure

PARTS: dict[str, tuple[Layout, ...]] = {
    "fp32": (("0", 1), ("1", 2), ("2 offload", 1), ("3", 2)),
    "bf16": (("0", 1), ("2", 2), ("3", 1)),
}


@pytest.mark.drill
@pytest.mark.parametrize("precision", PARTS)
def test_a_run_goes_on_with_other_ranks_and_stages(precision, tmp_path):
    pairs = measure(precision, PARTS[precision], tmp_path)
    assert len(pairs) == len(PARTS[precision]) ** 2
    assert not [pair for pair in pairs if not pair.kept()]
