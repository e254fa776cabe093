"""A stand-in for CUDA graphs on a CPU: a capture keeps the operations of one call, without Python."""

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


def refuse_captures(monkeypatch) -> None:
    """Give torch.cuda, as far as device.captured uses it, streams that do nothing and captures that fail."""

    @contextmanager
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted\nCUDA kernel errors might be reported later")
        yield

    for name in ("Stream", "CUDAGraph", "current_stream", "set_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", refuse)


def plant_captures() -> None:
    """Let train.py run on this process's CPU as it would run with CUDA graphs."""
    device.captured = capture
    builder.check_graphs = lambda *_: None
    torch.cuda.graph_pool_handle = lambda: object()
