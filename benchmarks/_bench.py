"""What every benchmark shares: interleaved timing with its spread, peak memory, and one JSON a run with machine and
commit."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch

RESULTS = Path(__file__).with_name("results")


def time_interleaved(
    calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 seconds of each call, and its peak extra GPU memory. Calls take turns, so drift hits all
    alike."""
    cuda = torch.cuda.is_available()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peak = dict.fromkeys(calls, 0)
    for repeat in range(warmup + repeats):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() - before)
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, values in seconds.items():
        fifths = quantiles(values, n=5, method="inclusive")
        results[name] = {"median_s": median(values), "p20_s": fifths[0], "p80_s": fifths[3]}
        if cuda:
            results[name]["peak_memory_mib"] = peak[name] / 2**20
    return results


def machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def write_json(name: str, results: dict, out: str | None = None) -> Path:
    """results/<name>_<cpu or the GPU's name>.json, or `out`."""
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
    path = Path(out) if out else RESULTS / f"{name}_{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return path
