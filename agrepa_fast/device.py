"""CUDA graphs, and copies between host and device that wait for nothing."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

GRAPHS = Counter()  # CUDA graphs that this process has "captured", and how often it has "replayed" one


class CaptureError(ValueError):
    """A computation cannot be captured as a CUDA graph. The message is CUDA's reason; the caller adds the remedy."""


def captured(call: Callable[[], None], pool, warmup: int = 2) -> Callable[[], None]:
    """Return a function that replays `call` as one CUDA graph.

    `call` first runs `warmup` times; the random states are as before then, so that its draws are those of a `call`
    that is not captured. pool: of torch.cuda.graph_pool_handle(). Raises CaptureError if it cannot be captured, or if
    the GPU's memory does not suffice.
    """
    before = torch.cuda.current_stream()
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream), torch.random.fork_rng([torch.cuda.current_device()]):
            for _ in range(warmup):
                call()
    except torch.OutOfMemoryError as error:
        raise _capture_error(error) from error
    before.wait_stream(stream)
    try:
        # NCCL's watchdog may call CUDA meanwhile: thread_local.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            call()
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # a capture that fails to end leaves its own
        raise _capture_error(error) from error
    return graph.replay


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all warm-ups and captures of a GPU. cuBLAS keeps a workspace per stream: made in a warm-up,
    it takes no room in the memory of the graphs."""
    return torch.cuda.Stream(device)


def _capture_error(error: RuntimeError) -> CaptureError:
    return CaptureError(str(error).strip().partition("\n")[0])


class CapturedProgram:
    """A function of tensors, captured as one CUDA graph whose inputs and outputs stay where they are.

    compute: returns a tuple of tensors. inputs: tensors, or objects whose `map` applies a function to each of their
    tensors (Batch, Condition). Calling the program copies new inputs of the same shapes into place, replays the graph,
    and returns copies of the outputs. Raises CaptureError.
    """

    def __init__(self, compute: Callable[..., tuple[torch.Tensor, ...]], inputs: tuple, pool):
        self._compute = compute
        self._inputs = tuple(map_tensors(_copy, value) for value in inputs)
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._replay = captured(self._run, pool)

    def __call__(self, *inputs) -> tuple[torch.Tensor, ...]:
        for place, value in zip(tensors_of(*self._inputs), tensors_of(*inputs), strict=True):
            _own_part(place).copy_(_own_part(value))
        self._replay()
        return tuple(output.clone() for output in self._outputs)

    def _run(self) -> None:
        outputs = self._compute(*self._inputs)
        if not self._outputs:  # the first warm-up run: a graph only writes to tensors that exist
            self._outputs = tuple(torch.empty_like(output) for output in outputs)
        for place, output in zip(self._outputs, outputs, strict=True):
            place.copy_(output.detach())


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of an expanded tensor that has memory of its own, and any other tensor as it is."""
    if 0 not in tensor.stride():
        return tensor
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor[tuple(slice(0, 1) if size > 1 and stride == 0 else slice(None) for size, stride in sizes)]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, expanded as it is: a batch's empty reference stays one number."""
    return _own_part(tensor).clone().expand(tensor.shape)


class CapturedPrograms:
    """Captured programs over the same live weights, by key. Their graphs share one memory pool."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, CapturedProgram] = {}
        self._valid_for: Hashable = None
        self._pool = None

    def drop_stale(self, weights: Iterable[torch.Tensor], *conditions: Hashable) -> bool:
        """Drop all programs if a weight has moved since the last call, or a condition has changed; return whether.

        Weights move when a checkpoint is loaded into new tensors or they are offloaded. Call it before each use.
        """
        valid_for = (tuple(weight.data_ptr() for weight in weights), *conditions)
        stale = valid_for != self._valid_for
        if stale:
            self.drop()
            self._valid_for = valid_for
        if not self._programs:
            self._pool = torch.cuda.graph_pool_handle()  # a pool whose graphs are gone cannot be taken again
        return stale

    def drop(self) -> None:
        """Drop all programs."""
        self._programs = {}

    def capture(self, key: Hashable, compute: Callable[..., tuple[torch.Tensor, ...]], *inputs) -> None:
        self._programs[key] = CapturedProgram(compute, inputs, self._pool)
        GRAPHS["captured"] += 1

    def __call__(self, key: Hashable, *inputs) -> tuple[torch.Tensor, ...]:
        GRAPHS["replayed"] += 1
        return self._programs[key](*inputs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._programs

    def __len__(self) -> int:
        return len(self._programs)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value):
    """Return `value`, a tensor or an object with `map`, with `function` applied to its tensors."""
    return function(value) if isinstance(value, torch.Tensor) else value.map(function)


def tensors_of(*values) -> list[torch.Tensor]:
    """Return the tensors of values that are tensors or objects with `map`, in a fixed order."""
    tensors: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    for value in values:
        map_tensors(collect, value)
    return tensors


class DeviceCopies:
    """A tensor on the host and its copies on devices, one per device, made on first use without waiting for a GPU."""

    def __init__(self, host: torch.Tensor):
        self.host = host
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._copies:
            self._copies[device] = to_device(self.host, device)
        return self._copies[device]


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device. To a GPU it is only queued, from pinned memory; on a CPU it is `host` itself."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host. From a GPU it is only queued, into pinned memory: wait for an event before reading."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class SideStream:
    """A stream for work that runs beside the current stream's. On a CPU the work is done at once."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, call: Callable[[], T], *, after_queued: bool = True) -> T:
        """Queue call() and return its result. after_queued: it waits for all that is queued on the current stream."""
        if self._stream is None:
            return call()
        if after_queued:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return call()

    def join(self, results: Iterable[torch.Tensor] = ()) -> None:
        """Let the current stream wait for the work that was queued. results: tensors that this work has made."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for result in results:
            result.record_stream(current)  # or their memory could be used again too early


def record(device: torch.device) -> torch.cuda.Event | None:
    """Return an event after the work that is queued on a GPU by now, or None on a CPU, where work is never queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
