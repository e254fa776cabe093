"""Time forward and backward passes of several methods that take turns, and measure their peak memory."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

_FLUSH_BYTES = 256 * 2**20  # several times a GPU's L2
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


def time_phases(methods: dict[str, Phases], repeats: int, warmup: int = 2, *, apart: bool = True) -> dict[str, dict]:
    """Return seconds of forward, backward and both per method, and its peak extra GPU memory (MiB).

    Methods take turns, so that drift changes all of them. With `apart`, the GPU's cache is flushed before the backward
    too, not before the forward only.
    """
    cuda = torch.cuda.is_available()
    seconds = {name: {"forward": [], "backward": [], "both": []} for name in methods}
    peak = dict.fromkeys(methods, 0)
    _flush_l2()
    for repeat in range(warmup + repeats):
        for name, (forward, backward) in methods.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            _flush_l2()
            stamps = [_stamp()]
            output = forward()
            stamps += [_stamp()] * 2
            if backward is not None:
                if apart:
                    _flush_l2()
                    stamps[2] = _stamp()
                backward(output)
                stamps.append(_stamp())
            del output
            if cuda:
                torch.cuda.synchronize()
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() - before)
            if repeat < warmup:
                continue
            taken = [_seconds(*stamps[:2]), _seconds(*stamps[2:]) if backward is not None else 0.0]
            for phase, value in zip(seconds[name], (*taken, sum(taken)), strict=True):
                seconds[name][phase].append(value)
    results = {}
    for name, (_, backward) in methods.items():
        phases = seconds[name] if backward is not None else {"forward": seconds[name]["forward"]}
        results[name] = {phase: spread(values) for phase, values in phases.items()}
        if cuda:
            results[name]["peak_memory_mib"] = peak[name] / 2**20
    return results


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


def time_interleaved(
    calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Return median, p20 and p80 seconds per call, and its peak extra GPU memory (MiB). The calls take turns."""
    timed = time_phases({name: Phases(call) for name, call in calls.items()}, repeats, warmup)
    return {name: result.pop("forward") | result for name, result in timed.items()}


def milliseconds(timing: dict[str, float]) -> str:
    """Return a timing as text: median (p20 to p80) in ms."""
    return f"{1e3 * timing['median_s']:.3f} ({1e3 * timing['p20_s']:.3f} to {1e3 * timing['p80_s']:.3f})"
