"""train.py as it would run with CUDA graphs, on a CPU: a capture keeps the operations of one call, without Python."""

import sys

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from agrepa_fast import train
from agrepa_fast.training import captured_step as graphs


def capture(call, pool, warmup=2):
    for _ in range(warmup):
        call()
    operations = make_fx(lambda: call())()
    return lambda: operations() and None


if __name__ == "__main__":
    graphs.captured = capture
    train.check_graphs = lambda *_: None
    torch.cuda.graph_pool_handle = lambda: object()
    train.main(sys.argv[1:])
