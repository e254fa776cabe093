"""Settings that were mutated at random are accepted or refused in one line."""

import os

import pytest

from .fuzz_settings import KINDS, fuzz, summary
from .results import RECORD, record


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_hostile_settings(kind):
    found = fuzz(kind, 300, seed=1)
    assert found.broken == []
    assert found.accepted > 0
    assert len(found.refused) > 10


@pytest.mark.drill
def test_many_hostile_settings():
    lines, broken = summary(5000, seed=2)
    if RECORD in os.environ:
        record("Hostile settings", "pytest -m drill tests/drills/test_fuzz_settings.py", lines)
    assert broken == []
