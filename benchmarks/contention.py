"""A training step of the demo's size on all cores, idle and beside one busy process, by how long OpenMP's threads spin.

python benchmarks/contention.py [--rounds 7] [--steps 3] [--out FILE]

Each setting has a process of its own, because libgomp reads it once. The processes take turns: in a round each makes a
few steps while the others sleep. Ratios are taken within a round. `fair` is the time that the step would take if the
busy process got its share of the cores and no more: (threads + 1) / cores of the idle time.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median, quantiles

import torch
from _results import print_table, write_json
from _training import OurStep, Sizes

SETTINGS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
DEMO = Sizes(dim=192, depth=8, frames=190, batch=8, mels=80, vocab=512, device="cpu", dtype=torch.float32)
BUSY = "while True: pass"


class Stepper:
    """A process that makes training steps under one setting when it is asked to."""

    def __init__(self, setting: dict[str, str]):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--stepper"],
            env=environment | setting,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, steps: int) -> float:
        """Make steps, and return the seconds per step."""
        print(steps, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def make_steps() -> None:
    """The body of a Stepper's process: a number of steps per line of input, the seconds per step as output."""
    step = OurStep(DEMO, DEMO.batch)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - start) / int(line), flush=True)


def measure(steppers: dict[str, Stepper], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds per step of every round, by setting. Each round starts with another setting."""
    names, taken = list(steppers), {name: [] for name in steppers}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(steppers[name].seconds(steps))
    return taken


def spread(values: list[float]) -> list[float]:
    """Return the median and the 20th and 80th percentile."""
    fifths = quantiles(values, n=5, method="inclusive")
    return [median(values), fifths[0], fifths[3]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each setting per round")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/contention_cpu.json)")
    parser.add_argument("--stepper", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stepper:
        make_steps()
        return
    steppers = {name: Stepper(setting) for name, setting in SETTINGS.items()}
    busy = None
    try:
        measure(steppers, 1, 2)  # warm up
        idle = measure(steppers, args.rounds, args.steps)
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        beside = measure(steppers, args.rounds, args.steps)
    finally:
        for process in [stepper.process for stepper in steppers.values()] + [busy] * (busy is not None):
            process.kill()
            process.wait()
    cores = os.cpu_count()
    fair, default = (cores + 1) / cores, idle["libgomp's default"]
    found = {
        name: {
            "idle_s": median(idle[name]),
            "idle_over_default": spread([a / b for a, b in zip(idle[name], default, strict=True)]),
            "busy_over_fair": spread([b / median(idle[name]) / fair for b in beside[name]]),
        }
        for name in SETTINGS
    }
    rows = [
        (name, f"{r['idle_s']:.3f}", *("{:.2f} ({:.2f} to {:.2f})".format(*r[k]) for k in list(r)[1:]))
        for name, r in found.items()
    ]
    header = ("setting", "idle s/step", "idle, over the default's", "beside a busy process, over the fair share")
    print_table(f"{cores} threads on {cores} cores", header, rows)
    print("wrote", write_json("contention", {"fair_over_idle": fair, "settings": found}, args.out))


if __name__ == "__main__":
    main()
