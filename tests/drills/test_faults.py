"""Each fault of injections.py keeps its promises."""

import os

import pytest

from .faults import FaultDrill
from .injections import CHECKPOINT_FILES, INJECTIONS, newest_checkpoint

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def drill(tmp_path_factory) -> FaultDrill:
    return FaultDrill(tmp_path_factory.mktemp("faults"))


def test_every_file_of_a_checkpoint_has_its_kill(drill):
    assert {file.name for file in newest_checkpoint(drill.whole(2)).iterdir()} == set(CHECKPOINT_FILES)


@pytest.mark.parametrize("injection", INJECTIONS, ids=str)
def test_a_run_survives(injection, drill):
    if injection.disk is not None and os.geteuid() != 0:
        pytest.skip("mounts a small file system, which needs root")
    outcome = drill.run(injection)
    assert not outcome.broken, (outcome.happened, outcome.message)
