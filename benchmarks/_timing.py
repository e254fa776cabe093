"""Time methods that take turns: forward and backward apart, or whole steps one after another; and their peak memory.

On a GPU, its time and the CPU's are apart: the GPU is kept busy until a call is queued, so that an interval between two
events holds kernels and no wait for Python.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

_FLUSH_BYTES = 256 * 2**20  # several times a GPU's L2
_SLEEP_CYCLES = 2e9  # of torch.cuda._sleep in a second, about; a lower clock only holds the GPU for longer
_LONGEST_HOLD = 0.06  # seconds
_flush: torch.Tensor | None = None


class Phases(NamedTuple):
    """One method: its forward, and its backward, which takes the forward's result (None: no backward)."""

    forward: Callable[[], object]
    backward: Callable[[object], object] | None = None


def _stamp() -> torch.cuda.Event | float:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _flush_l2() -> None:
    """Evict the tensors from the GPU's cache, as other layers do in training."""
    global _flush
    if torch.cuda.is_available():
        if _flush is None:
            _flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        _flush.zero_()


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    fifths = quantiles(values, n=5, method="inclusive")
    return {"median_s": median(values), "p20_s": fifths[0], "p80_s": fifths[3]}


class _Stopwatch:
    """Times of one phase of one method."""

    def __init__(self) -> None:
        self.stamps: list[tuple] = []  # start and end of each call
        self.cpu: list[float] = []  # seconds that each call took to return
        self._hold = 0.0

    def __call__(self, call: Callable[[], object], flush: bool) -> object:
        """Return call(), timed. On a GPU it is held back until the call is queued, by twice the CPU time of the call
        before; the first call has no such time, so warm up."""
        if flush:
            _flush_l2()
        if self._hold:
            torch.cuda._sleep(int(self._hold * _SLEEP_CYCLES))
        start, before = _stamp(), time.perf_counter()
        result = call()
        took = time.perf_counter() - before
        self.stamps.append((start, _stamp()))
        self.cpu.append(took)
        if torch.cuda.is_available():
            self._hold = min(2 * took + 1e-3, _LONGEST_HOLD)
        return result


def time_phases(methods: dict[str, Phases], repeats: int, warmup: int = 2, *, apart: bool = True) -> dict[str, dict]:
    """Return seconds of forward, backward and both per method; on a GPU also the CPU's seconds until both are queued
    (`cpu`) and the peak extra memory (MiB).

    Methods take turns, so that drift changes all of them. With `apart`, the GPU's cache is flushed before the backward
    too, not before the forward only.
    """
    cuda = torch.cuda.is_available()
    watches = {name: (_Stopwatch(), _Stopwatch()) for name in methods}
    peak = dict.fromkeys(methods, 0)
    _flush_l2()
    for _ in range(warmup + repeats):
        for name, (forward, backward) in methods.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            output = watches[name][0](forward, flush=True)
            if backward is not None:
                watches[name][1](lambda backward=backward, output=output: backward(output), flush=apart)
            del output
            if cuda:
                torch.cuda.synchronize()
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() - before)
    results = {}
    for name, (_, backward) in methods.items():
        timed = [watch for watch in watches[name] if watch.stamps]
        seconds = [[_seconds(*stamps) for stamps in watch.stamps[warmup:]] for watch in timed]
        results[name] = dict(zip(("forward", "backward"), map(spread, seconds), strict=False))
        if backward is not None:
            results[name]["both"] = spread([sum(parts) for parts in zip(*seconds, strict=True)])
        if cuda:
            results[name]["cpu"] = spread([sum(parts) for parts in zip(*(w.cpu[warmup:] for w in timed), strict=True)])
            results[name]["peak_memory_mib"] = peak[name] / 2**20
    return results


def time_interleaved(calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, dict]:
    """Return what time_phases does per call, with the times of the call itself. The calls take turns."""
    timed = time_phases({name: Phases(call) for name, call in calls.items()}, repeats, warmup)
    return {name: result.pop("forward") | result for name, result in timed.items()}


def time_steps(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    steps: int = 4,
    inside: dict[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, dict]:
    """Return the wall seconds per call where `steps` of them follow each other, as in training: the CPU may run ahead,
    or the GPU wait for it. On a GPU also the CPU's seconds per call (`cpu`) and the peak extra memory (MiB).

    Calls take turns, one call more per turn, which is not timed. inside: contexts that calls run in.
    """
    cuda = torch.cuda.is_available()
    wall, cpu = {name: [] for name in calls}, {name: [] for name in calls}
    peak = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            with (inside or {}).get(name, nullcontext)():
                call()
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start = time.perf_counter()
                for _ in range(steps):
                    call()
                cpu[name].append((time.perf_counter() - start) / steps)
                if cuda:
                    torch.cuda.synchronize()
                    peak[name] = max(peak[name], (torch.cuda.max_memory_allocated() - before) / 2**20)
                wall[name].append((time.perf_counter() - start) / steps)
    if not cuda:
        return {name: spread(wall[name]) for name in calls}
    return {name: spread(wall[name]) | {"cpu": spread(cpu[name]), "peak_memory_mib": peak[name]} for name in calls}


def peak_memory_mib(call: Callable[[], object]) -> float:
    """Return the most memory that one call held beyond what was held before: on a GPU allocated memory, on a CPU the
    process's resident pages, read every millisecond."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # the call could reuse free heap of earlier calls, which is resident already
    page, statm = os.sysconf("SC_PAGE_SIZE"), Path("/proc/self/statm")
    resident, done = [int(statm.read_text().split()[1])], threading.Event()

    def watch() -> None:
        while not done.wait(1e-3):
            resident.append(int(statm.read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return (max(resident) - resident[0]) * page / 2**20


def milliseconds(timing: dict[str, float]) -> str:
    """Return a timing as text: median (p20 to p80) in ms."""
    return f"{1e3 * timing['median_s']:.3f} ({1e3 * timing['p20_s']:.3f} to {1e3 * timing['p80_s']:.3f})"
