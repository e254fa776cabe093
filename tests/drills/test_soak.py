"""A short soak."""

import pytest

from ..testing import write_small_shards
from .soak import Soak


@pytest.mark.drill
def test_random_kills_break_no_promise(tmp_path):
    preset = write_small_shards(tmp_path / "shards")
    settings = ("--preset", str(preset), "train.steps=400", "train.val_every=100", "align.strategy=random")
    soak = Soak(tmp_path / "run", 1.5, 4, 0, settings)
    soak.train()
    assert soak.strikes(), "the run ended before the first strike"
    assert not soak.broken()
    assert soak.stretches[-1].done == 400
