"""A rank that no longer answers."""

import pytest

from ..ranks import run_ranks

FROZEN_RANK = """
import os, signal, time
import torch
import torch.distributed as dist
from datetime import timedelta
from agrepa_fast.train import explain
from agrepa_fast.zero.process_group import set_collective_timeout

dist.init_process_group("gloo", timeout=timedelta(hours=12))
other = dist.new_group()
set_collective_timeout(0.03)
pids = [None, None]
dist.all_gather_object(pids, os.getpid())
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
for group in (None, other):
    start = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        print(time.monotonic() - start < 30, explain(error))
os.kill(pids[1], signal.SIGCONT)
os._exit(0)
"""


@pytest.mark.drill
def test_a_frozen_rank_is_not_waited_for(tmp_path):
    """As with a machine that is gone without a word, no connection is closed; in every process group."""
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN_RANK)
    lines = [line for line in run_ranks(2, script)[0].splitlines() if line.startswith("True ")]
    assert len(lines) == 2, lines
    assert all("another rank ended, or does not answer" in line for line in lines)
