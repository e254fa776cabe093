"""A stand-in for CUDA graphs on a CPU: a capture keeps the operations of one call, without Python."""

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from agrepa_fast import device
from agrepa_fast.training import builder


def capture(call, pool, warmup=2):
    for _ in range(warmup):
        call()
    operations = make_fx(lambda: call())()
    return lambda: operations() and None


def stand_in_for_cuda(monkeypatch, graph: Callable) -> None:
    """Give torch.cuda, as far as device.captured uses it, streams and random states that do nothing, and `graph` for
    torch.cuda.graph."""
    for name in ("CUDAGraph", "current_stream", "set_stream", "graph_pool_handle", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    stream = Mock()
    monkeypatch.setattr(device, "_capture_stream", lambda number: stream)


def refuse_captures(monkeypatch) -> None:
    """Let captures fail."""

    @contextmanager
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted\nCUDA kernel errors might be reported later")
        yield

    stand_in_for_cuda(monkeypatch, refuse)


def plant_captures() -> None:
    """Let train.py run on this process's CPU as it would run with CUDA graphs."""
    device.captured = capture
    builder.check_graphs = lambda *_: None
    torch.cuda.graph_pool_handle = lambda: object()


def plant_few_shapes() -> None:
    """Let train.py run on this process's CPU as on a GPU with length buckets: it captures two shapes by itself."""
    plant_captures()
    builder.count_shapes = lambda replayable, *_: 2 if replayable else 0


def plant_few_shapes_on_rank_0() -> None:
    """The same, but only rank 0 can capture."""
    (plant_few_shapes if os.environ["RANK"] == "0" else plant_failing_captures)()


def plant_failing_captures() -> None:
    """The same, but no step can be captured."""
    plant_few_shapes()

    def fail(call, pool, warmup=2):
        raise device.CaptureError("out of memory")

    device.captured = fail
