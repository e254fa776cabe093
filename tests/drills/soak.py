"""Train with processes killed at random and resumed automatically: count the lost steps, compare the repeated ones, and
watch memory.

python -m tests.drills.soak [--minutes 20] [--every 45] [--seed 0] [--record] [--preset NAME] [section.field=value ...]

Two ranks with a loader process each, through the deepspeed launcher; the demo run unless --preset says otherwise. For
three quarters of the time SIGKILL goes to a rank, a loader process or the launcher, or SIGTERM to a rank, on average
--every seconds of training apart; then the run goes on undisturbed to its end. Exits with 1 when a kill costs more than
the steps since the last save, a repeated step has another loss, the run fails, or memory grows.
"""

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ..ranks import ROOT
from .harness import TOLERANCE, Job, kill, last_step, read_steps, saved_step, start
from .results import record

SAVE_EVERY = 10
STEPS_PER_MINUTE = 120  # for the default of train.steps; a 2-core machine does fewer
SETTLED = 240.0  # seconds of training after which memory should no longer grow: allocators keep what saves took
GROWTH = 2.0  # MiB per minute that count as flat
STRIKES = ("SIGKILL rank", "SIGKILL rank", "SIGKILL loader", "SIGKILL launcher", "SIGTERM rank")


@dataclass
class Stretch:
    """Training from a start or resume to the next strike, or to the end."""

    resumed_from: int
    first_step: float | None = None  # moment of the first training step, in seconds since the start of the soak
    strike: str | None = None
    ended: float = 0.0
    done: int = 0
    lost: int = 0
    exit_code: int | None = None
    last_words: str = ""
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # process -> (seconds, MiB)

    def __str__(self) -> str:
        event = self.strike or "to the end"
        return f"{self.ended:6.0f} s: steps {self.resumed_from} to {self.done}, {event}, {self.lost} lost"


class Soak:
    def __init__(self, run: Path, minutes: float, every: float, seed: int, arguments: tuple[str, ...]):
        self.run, self.seconds, self.every = run, minutes * 60, every
        self.draw, self.begin = random.Random(seed), time.monotonic()
        self.stretches: list[Stretch] = []
        self.largest_difference = 0.0  # of the loss of a step that was done twice
        self.repeated = 0
        steps = round(STEPS_PER_MINUTE * minutes)
        settings = (f"train.steps={steps}", f"train.save_every={SAVE_EVERY}", "train.log_every=1", "data.workers=1")
        self.arguments = (f"run.dir={run}", *settings, *arguments)

    def now(self) -> float:
        return time.monotonic() - self.begin

    def train(self) -> None:
        """Train until the run has ended by itself. Raises RuntimeError when it fails without a strike."""
        losses: dict[int, float] = {}
        while not (self.run / "summary.json").is_file():
            stretch = Stretch(saved_step(self.run) or 0)
            self.stretches.append(stretch)
            self._train_stretch(stretch)
            self._compare(losses)
            print(stretch, flush=True)
            if stretch.strike is None and not (self.run / "summary.json").is_file():
                raise RuntimeError(f"ended by itself with exit code {stretch.exit_code}: {stretch.last_words}")

    def _train_stretch(self, stretch: Stretch) -> None:
        """Start or resume, strike once at a random moment, and count the steps."""
        resume = ("--resume", "latest") if saved_step(self.run) is not None else ()
        logs = self.run.with_name(self.run.name + "-logs")
        job = start(2, "--ds_config", "zero2.json", *resume, *self.arguments, cwd=ROOT, logs=logs, launched=True)
        try:
            self._watch(job, stretch)
            # A scheduler ends the rest of a job whose launcher is gone.
            job.wait_for_remaining(0.0 if stretch.strike == "SIGKILL launcher" else 60.0)
            stretch.exit_code = job.started[0].wait()
            stretch.last_words = job.last_words()
        finally:
            job.kill()
        stretch.ended = self.now()
        stretch.done = max(0, last_step(self.run))
        stretch.lost = stretch.done - (saved_step(self.run) or 0)

    def _watch(self, job: Job, stretch: Stretch) -> None:
        """Sample memory every second until the job ends or the strike has come."""
        metrics = self.run / "metrics.jsonl"  # a resume replaces it by a file without the lost steps
        before = metrics.stat().st_ino if metrics.is_file() else None
        delay = self.draw.expovariate(1 / self.every)
        while job.alive():
            begun = metrics.is_file() and metrics.stat().st_ino != before
            ready = begun and saved_step(self.run) is not None and last_step(self.run) > stretch.resumed_from
            if stretch.first_step is None and ready:
                stretch.first_step = self.now()
            if stretch.first_step is not None:
                self._sample_memory(job, stretch)
                if self.now() < 0.75 * self.seconds and self.now() - stretch.first_step > delay:
                    self._strike(job, stretch)
                    return
            time.sleep(min(1.0, delay))

    def _sample_memory(self, job: Job, stretch: Stretch) -> None:
        for rank, pid in enumerate(job.ranks()):
            named = {f"rank {rank}": pid} | {f"loader of rank {rank}": loader for loader in job.loaders(rank)}
            for name, process in named.items():
                if (memory := _resident_mib(process)) is not None:
                    stretch.memory.setdefault(name, []).append((self.now(), memory))

    def _strike(self, job: Job, stretch: Stretch) -> None:
        strike, rank, pids = self.draw.choice(STRIKES), self.draw.randrange(2), job.ranks()
        if len(pids) < 2:  # the run came to its end just now
            return
        stretch.strike = strike
        number, victim = strike.split()
        targets = {"rank": [pids[rank]], "loader": job.loaders(rank), "launcher": [job.started[0].pid]}[victim]
        kill(targets, signal.Signals[number])

    def _compare(self, losses: dict[int, float]) -> None:
        """Compare the losses of steps that an earlier stretch had done already, then add this stretch's to `losses`."""
        for line in read_steps(self.run):
            if (loss := line.get("train/loss")) is None:
                continue
            if line["step"] in losses and line["step"] > self.stretches[-1].resumed_from:
                self.repeated += 1
                self.largest_difference = max(self.largest_difference, abs(loss - losses[line["step"]]))
            losses[line["step"]] = loss

    def growth(self) -> dict[str, float]:
        """Return MiB per minute for each kind of process: least squares over all settled stretches, each around its own
        mean."""
        products: dict[str, list[float]] = {}
        for stretch in self.stretches:
            for name, samples in stretch.memory.items():
                settled = [(t, m) for t, m in samples if t - stretch.first_step > SETTLED]
                if len(settled) < 2:
                    continue
                time_mean, memory_mean = (sum(values) / len(settled) for values in zip(*settled, strict=True))
                sums = products.setdefault(name, [0.0, 0.0])
                sums[0] += sum((t - time_mean) * (m - memory_mean) for t, m in settled)
                sums[1] += sum((t - time_mean) ** 2 for t, _ in settled)
        return {name: 60 * above / below for name, (above, below) in sorted(products.items()) if below > 0}

    def broken(self) -> list[str]:
        """Return the promises that were broken."""
        found = []
        for stretch in self.stretches:
            promised = 0 if stretch.strike in (None, "SIGTERM rank") else SAVE_EVERY
            if stretch.lost > promised:
                found.append(f"{stretch.lost} steps lost by {stretch.strike} at {stretch.ended:.0f} s")
        if self.largest_difference > TOLERANCE:
            found.append(f"a repeated step differs by {self.largest_difference:.1e}")
        rates = self.growth().items()
        return found + [f"{name} grows by {rate:.1f} MiB per minute" for name, rate in rates if rate > GROWTH]

    def strikes(self) -> Counter[str]:
        return Counter(stretch.strike for stretch in self.stretches if stretch.strike)

    def summary(self) -> list[str]:
        """Return a few lines for results.md."""
        strikes = ", ".join(f"{count} x {name}" for name, count in sorted(self.strikes().items()))
        rates = ", ".join(f"{name} {rate:+.1f}" for name, rate in self.growth().items()) or "too short to tell"
        file = self.run / "summary.json"
        loss = json.loads(file.read_text())["val/flow_loss"] if file.is_file() else "the run did not end"
        return [
            f"- {self.stretches[-1].done} steps in {self.now() / 60:.1f} minutes; strikes: {strikes}",
            f"- {sum(stretch.lost for stretch in self.stretches)} steps lost and repeated; {self.repeated} repeated "
            f"steps compared, largest difference of a loss {self.largest_difference:.1e}",
            f"- growth of resident memory, MiB per minute, from {SETTLED / 60:.0f} minutes after a start: {rates}",
            f"- val/flow_loss at the end: {loss}",
        ]


def _resident_mib(pid: int) -> float | None:
    try:
        return psutil.Process(pid).memory_info().rss / 2**20
    except psutil.Error:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=45, help="mean seconds of training between strikes")
    parser.add_argument("--seed", type=int, default=0, help="of the strikes")
    parser.add_argument("--run", type=Path, default=Path("runs/soak"), help="a new folder")
    parser.add_argument("--record", action="store_true", help="write the summary to tests/drills/results.md")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    if args.run.exists():
        raise SystemExit(f"{args.run} exists: remove it")
    settings = ("--preset", args.preset, *args.overrides)
    soak, broken = Soak(args.run.absolute(), args.minutes, args.every, args.seed, settings), []
    try:
        soak.train()
    except RuntimeError as error:
        broken.append(str(error))
    broken += soak.broken()
    lines = [*soak.summary(), f"- {'; '.join(broken) or 'all promises kept'}"]
    print("\n".join(lines))
    if args.record:
        record("Soak", f"python -m tests.drills.soak --minutes {args.minutes:g}", lines)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
