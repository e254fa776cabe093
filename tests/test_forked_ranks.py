"""Forked ranks (ranks.py) leave nothing behind for the next ones."""

import itertools
import os
import socket
import time
from pathlib import Path

import pytest

from . import ranks
from .ranks import fork_ranks


def leave_traces() -> int:
    """Change what a process can change of its own, and return its id."""
    os.chdir("/")
    os.environ["TRACE"] = "left"
    ranks.SECONDS = 0
    return os.getpid()


def look_for_traces() -> tuple:
    return str(Path.cwd()), os.environ.get("TRACE"), ranks.SECONDS, os.getpid()


def fail() -> None:
    raise RuntimeError("on purpose")


def test_every_rank_is_a_process_of_its_own(tmp_path):
    first, second = fork_ranks(2, leave_traces, cwd=tmp_path)
    (later,) = fork_ranks(1, look_for_traces, cwd=tmp_path)
    assert (first.code, second.code, later.code) == (0, 0, 0)
    assert later.value[:3] == (str(tmp_path), None, ranks.SECONDS)
    assert len({first.value, second.value, later.value[3], os.getpid()}) == 4


def test_a_rank_that_fails_or_hangs_ends_alone(monkeypatch):
    (failed,) = fork_ranks(1, fail)
    assert (failed.code, failed.value) == (1, None)
    assert "RuntimeError: on purpose" in failed.output
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "SECONDS", 0.5)
        (hung,) = fork_ranks(1, time.sleep, 600)
    assert (hung.code, hung.value) == (-9, None)
    (later,) = fork_ranks(1, os.getpid)
    assert later.code == 0


def test_a_failure_is_shown_with_the_rank_s_output():
    with pytest.raises(AssertionError, match="RuntimeError: on purpose"):
        ranks.call_on_ranks(2, fail)


def test_two_runs_of_the_tests_never_share_a_port(monkeypatch):
    """A group whose store has ranks of another loses one of its own ranks, and reports a reset connection."""
    monkeypatch.setattr(ranks, "_ports", itertools.count(7))
    first = ranks.free_port()
    monkeypatch.setattr(ranks, "_ports", itertools.count(7))
    assert ranks.free_port() != first
    with socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("127.0.0.1", int(first)))
        store.listen()
        socket.create_connection(store.getsockname()).close()
