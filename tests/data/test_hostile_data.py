"""A few damaged recordings and tars; the drill has 2,000."""

from ..drills import hostile_data
from ..drills.hostile_data import HostileData


def test_damaged_files_are_read_or_left_out():
    drill = HostileData(seed=1, first=0, last=110).run()
    assert not drill.faults
    assert sum(drill.outcomes.values()) == 110
    assert {form for form, _ in drill.outcomes} == set(hostile_data.FORMATS)
    assert {kind for _, kind in drill.outcomes} >= {"read", "bad recording", "refused tar"}


def test_a_file_that_takes_too_long_is_found(monkeypatch):
    monkeypatch.setattr(hostile_data, "SECONDS", 0.0)
    [fault] = HostileData(seed=1, first=3, last=4).run().faults
    assert fault == "file 3 (ogg) took more than 0.0 s"
