"""The record of planted faults (plant_faults.py) is that of the faults which can still be planted."""

import json
from pathlib import Path

import pytest

from .attribution_faults import FAULTS as ATTRIBUTION_FAULTS
from .faults import FAULTS as KERNEL_FAULTS

FAULTS = KERNEL_FAULTS | ATTRIBUTION_FAULTS
ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "tests" / "plant_faults.json").read_text())


@pytest.mark.parametrize("operation", FAULTS)
def test_every_fault_still_fits_its_file_and_was_caught(operation):
    assert len(FAULTS[operation]) >= 6
    caught = {fault["fault"] for fault in RECORD[operation] if fault["caught_by"]}
    for file, old, new, what in FAULTS[operation]:
        assert (ROOT / file).read_text().count(old) == 1, f"{file}: {what}"
        assert old != new
        assert what in caught, what
