"""Each fault of injections.py keeps its promises."""

import os
from collections.abc import Iterator

import pytest

from .faults import FaultDrill, summary
from .injections import CHECKPOINT_FILES, INJECTIONS, newest_checkpoint
from .results import RECORD, record

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def drill(tmp_path_factory) -> Iterator[FaultDrill]:
    drill = FaultDrill(tmp_path_factory.mktemp("faults"))
    yield drill
    if RECORD in os.environ:
        record("Faults", "pytest -m drill tests/drills/test_faults.py", summary(drill.outcomes))


def test_every_file_of_a_checkpoint_has_its_kill(drill):
    assert {file.name for file in newest_checkpoint(drill.whole(2)).iterdir()} == set(CHECKPOINT_FILES)


@pytest.mark.parametrize("injection", INJECTIONS, ids=str)
def test_a_run_survives(injection, drill):
    if injection.disk is not None and os.geteuid() != 0:
        pytest.skip("mounts a small file system, which needs root")
    outcome = drill.run(injection)
    assert not outcome.broken, (outcome.happened, outcome.message)
