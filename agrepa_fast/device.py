"""CUDA graphs, copies to the host that nothing waits for, and events."""

from collections.abc import Callable

import torch


def captured(call: Callable[[], None], pool, warmup: int = 2) -> Callable[[], None]:
    """A function that replays `call` as one CUDA graph, captured after `warmup` runs on a stream of their own. Raises
    ValueError when it cannot be captured, out of memory included."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's watchdog may call CUDA
            call()
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # a capture that fails to end leaves its own
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the probe cannot be captured ({why}): probe.graph=false runs it without CUDA graphs"
        ) from error
    return graph.replay


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host; from a GPU it is only queued, into pinned memory."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def record(device: torch.device) -> torch.cuda.Event | None:
    """An event after what is queued on a GPU by now; None on a CPU, where nothing is."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
