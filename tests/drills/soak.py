"""The demo run with processes killed at random and resumed by itself: what it loses, and whether its memory grows.

python benchmarks/soak.py [--minutes 20] [--every 45] [--seed 0] [--out FILE] [section.field=value ...]

Two ranks with a loader process each, through the deepspeed launcher. For three quarters of the time SIGKILL goes to a
rank, a loader process or the launcher, or SIGTERM to a rank, `--every` seconds of training apart (exponential); then
the run goes on to its end undisturbed. Steps that are done again after a resume must have the same loss. Exits with 1
when more is lost than promised, a step differs, the run does not come to its end, or memory grows. Writes
benchmarks/results/soak_<device>.json and .png beside it.
"""

import argparse
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from _bench import ROOT, write_json
from _processes import Job, kill, last_words, read_losses, saved_step, start, steps_done
from _soak_plot import plot

SAVE_EVERY = 10
STEPS_A_MINUTE = 120  # of train.steps; a 2-core machine does fewer
SETTLED = 240.0  # seconds of training after which memory should no longer grow: allocators keep what saves took
GROWTH = 2.0  # MiB a minute that count as flat
TOLERANCE = 1e-5
BLOWS = ("SIGKILL rank", "SIGKILL rank", "SIGKILL loader", "SIGKILL launcher", "SIGTERM rank")


@dataclass
class Stretch:
    """From a start or resume to the next blow, or to the end."""

    started: float  # seconds since the beginning
    resumed_from: int = 0
    first_step: float | None = None  # when training began
    blow: str | None = None
    struck: float | None = None
    ended: float | None = None
    done: int = 0
    lost: int = 0
    exit_code: int | None = None
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # process -> (seconds, MiB)


class Soak:
    def __init__(self, run: Path, minutes: float, every: float, seed: int, overrides: list[str]):
        self.run, self.seconds, self.every = run, minutes * 60, every
        self.draw, self.begin = random.Random(seed), time.monotonic()
        self.stretches: list[Stretch] = []
        self.worst = 0.0  # difference of a step that was done twice
        self.repeated = 0
        steps = round(STEPS_A_MINUTE * minutes)
        settings = (f"train.steps={steps}", f"train.save_every={SAVE_EVERY}", "train.log_every=1", "data.workers=1")
        self.settings = (f"run.dir={run}", *settings, *overrides)

    def now(self) -> float:
        return time.monotonic() - self.begin

    def go(self) -> None:
        """Until the run has ended by itself."""
        known: dict[int, float] = {}
        while not (self.run / "summary.json").is_file():
            saved = saved_step(self.run)
            self.stretch(saved)
            self.compare(known)
            print(self.report(self.stretches[-1]), flush=True)
            if self.stretches[-1].blow is None and not (self.run / "summary.json").is_file():
                raise RuntimeError(f"ended by itself, with exit code {self.stretches[-1].exit_code}: {self.last_words}")

    def stretch(self, saved: int | None) -> None:
        """Start or resume, strike once at a random moment, and look at what is left."""
        stretch = Stretch(self.now(), saved or 0)
        self.stretches.append(stretch)
        resume = ("--resume", "latest") if saved is not None else ()
        arguments = ("--ds_config", "zero2.json", *resume, *self.settings)
        job = start(2, *arguments, cwd=ROOT, logs=self.run.with_name(self.run.name + "-logs"), launched=True)
        try:
            self.watch(job, stretch)
            # What a scheduler does with the rest of a job whose launcher is gone.
            job.wait_until_left(0.0 if stretch.blow == "SIGKILL launcher" else 60.0)
            stretch.exit_code = job.started[0].wait()
            self.last_words = last_words(job)
        finally:
            job.kill()
        stretch.ended = self.now()
        stretch.done = max(0, steps_done(self.run))
        stretch.lost = stretch.done - (saved_step(self.run) or 0)

    def watch(self, job: Job, stretch: Stretch) -> None:
        """Sample memory every second until the job ends or the blow has come."""
        metrics = self.run / "metrics.jsonl"  # a resume puts a new one there, without the steps that were lost
        before = metrics.stat().st_ino if metrics.is_file() else None
        wait = self.draw.expovariate(1 / self.every)
        while job.alive():
            begun = metrics.is_file() and metrics.stat().st_ino != before
            ready = begun and saved_step(self.run) is not None and steps_done(self.run) > stretch.resumed_from
            if stretch.first_step is None and ready:
                stretch.first_step = self.now()
            if stretch.first_step is not None:
                self.sample(job, stretch)
                quiet = self.now() > 0.75 * self.seconds
                if not quiet and self.now() - stretch.first_step > wait:
                    self.strike(job, stretch)
                    return
            time.sleep(min(1.0, wait))

    def sample(self, job: Job, stretch: Stretch) -> None:
        for rank, pid in enumerate(job.ranks()):
            named = {f"rank {rank}": pid} | {f"loader of rank {rank}": loader for loader in job.loaders(rank)}
            for name, process in named.items():
                if (memory := _rss_mib(process)) is not None:
                    stretch.memory.setdefault(name, []).append((round(self.now(), 2), memory))

    def strike(self, job: Job, stretch: Stretch) -> None:
        stretch.blow, stretch.struck = self.draw.choice(BLOWS), self.now()
        number, victim = stretch.blow.split()
        rank = self.draw.randrange(2)
        pids = job.ranks()
        if len(pids) < 2:  # the run came to its end just now
            stretch.blow = stretch.struck = None
            return
        targets = {"rank": [pids[rank]], "loader": job.loaders(rank), "launcher": [job.started[0].pid]}[victim]
        kill(targets, signal.Signals[number])

    def compare(self, known: dict[int, float]) -> None:
        """Losses of steps that an earlier stretch had done already."""
        for step, loss in read_losses(self.run).items():
            if step in known and step > self.stretches[-1].resumed_from:
                self.repeated += 1
                self.worst = max(self.worst, abs(loss - known[step]))
            known[step] = loss

    def report(self, stretch: Stretch) -> str:
        what = stretch.blow or "to the end"
        return f"{stretch.ended:6.0f} s: steps {stretch.resumed_from} to {stretch.done}, {what}, {stretch.lost} lost"

    def growth(self) -> dict[str, float]:
        """MiB a minute of each kind of process: least squares of all settled stretches, each round its own mean."""
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

    def summary(self) -> dict:
        """Of the summary that the run wrote at its end; {} when it did not come to it."""
        file = self.run / "summary.json"
        names = ("val/flow_loss", "selection", "clips_per_s", "seconds")
        return {name: json.loads(file.read_text())[name] for name in names} if file.is_file() else {}

    def verdicts(self) -> list[str]:
        wrong = []
        for stretch in self.stretches:
            promised = 0 if stretch.blow in (None, "SIGTERM rank") else SAVE_EVERY
            if stretch.lost > promised:
                wrong.append(f"{stretch.lost} steps lost by {stretch.blow} at {stretch.struck:.0f} s")
        if self.worst > TOLERANCE:
            wrong.append(f"a step that was done again differs by {self.worst:.1e}")
        wrong += [
            f"{name} grows by {slope:.1f} MiB a minute" for name, slope in self.growth().items() if slope > GROWTH
        ]
        return wrong


def _rss_mib(pid: int) -> float | None:
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20, 2)
    except psutil.Error:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=45, help="mean seconds of training between blows")
    parser.add_argument("--seed", type=int, default=0, help="of the blows")
    parser.add_argument("--run", type=Path, default=Path("runs/soak"), help="a new folder")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/soak_<device>.json)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    if args.run.exists():
        raise SystemExit(f"{args.run} is there: remove it")
    soak = Soak(args.run.absolute(), args.minutes, args.every, args.seed, args.overrides)
    wrong = []
    try:
        soak.go()
    except RuntimeError as error:
        wrong.append(str(error))
    wrong += soak.verdicts()
    blows = [stretch.blow for stretch in soak.stretches if stretch.blow]
    content = {
        "settings": {"minutes": args.minutes, "every_s": args.every, "seed": args.seed, "save_every": SAVE_EVERY},
        "wall_s": round(soak.now(), 1),
        "steps": soak.stretches[-1].done,
        "steps_with_those_done_again": sum(stretch.done - stretch.resumed_from for stretch in soak.stretches),
        "blows": {blow: blows.count(blow) for blow in sorted(set(blows))},
        "steps_lost": sum(stretch.lost for stretch in soak.stretches),
        "steps_compared": soak.repeated,
        "largest_difference": soak.worst,
        "growth_mib_per_minute": soak.growth(),
        "summary": soak.summary(),
        "wrong": wrong,
        "stretches": [asdict(stretch) for stretch in soak.stretches],
    }
    path = write_json("soak", content, args.out)
    plot(content, path.with_suffix(".png"))
    printed = (
        "wall_s",
        "steps",
        "blows",
        "steps_lost",
        "steps_compared",
        "largest_difference",
        "growth_mib_per_minute",
    )
    for name in printed:
        print(f"{name}: {content[name]}")
    print(f"wrote {path} and {path.with_suffix('.png').name}; {'; '.join(wrong) or 'all promises kept'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
