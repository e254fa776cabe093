"""A soak of a minute."""

import pytest

from .soak import Soak


@pytest.mark.drill
def test_a_minute_of_random_kills_breaks_no_promise(tmp_path):
    from ..testing import write_small_shards

    preset = write_small_shards(tmp_path / "shards")
    settings = ("--preset", str(preset), "train.steps=400", "train.val_every=100", "align.strategy=random")
    soak = Soak(tmp_path / "run", 1, 4, 0, settings)
    soak.train()
    assert soak.strikes(), "the run ended before the first strike"
    assert not soak.broken()
    assert soak.stretches[-1].done == 400
