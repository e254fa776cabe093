"""2,000 damaged recordings and tars."""

import os

import pytest

from .hostile_data import HostileData
from .results import RECORD, record


@pytest.mark.drill
def test_damaged_files_are_read_or_left_out():
    drill = HostileData(0, 0, 2000).run()
    if RECORD in os.environ:
        record("Hostile data", "pytest -m drill tests/drills/test_hostile_data.py", drill.summary())
    assert not drill.faults
    assert sum(drill.outcomes.values()) == 2000
