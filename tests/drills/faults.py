"""Strike a run with each fault of injections.py, resume it, and compare it with the undisturbed run. Two ranks, fp32,
small random shards.

python -m tests.drills.faults [--only WORD ...] [--record] [--keep FOLDER]

Promises: SIGKILL loses at most the steps since the last complete checkpoint; a signal to stop loses none; every process
ends within a minute; the resumed curve equals the undisturbed one to 1e-5. Exits with 1 when one is broken. The full
disk needs root (a tmpfs).
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..testing import write_small_shards
from .harness import TOLERANCE, Job, curve_difference, last_step, saved_step, start
from .injections import INJECTIONS, SAVE_EVERY, STEPS, Injection, Target
from .results import record

SETTINGS = (
    *(f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", f"train.val_every={STEPS}", "train.log_every=1"),
    *("align.strategy=random", "train.precision=fp32", "flow.steps=1", "eval.clips=1", "probe.clips=1"),
)


@dataclass
class Outcome:
    """The consequences of one fault."""

    injection: Injection
    happened: str = ""
    exit_codes: list[int | None] = field(default_factory=list)
    seconds_to_end: float = 0.0  # of all processes, after the fault
    message: str = ""
    resumed_from: int = 0
    lost: int = 0  # steps
    difference: float = float("inf")  # largest of any loss or gradient norm of any step
    broken: list[str] = field(default_factory=list)  # promises


class FaultDrill:
    """Runs in folders below `work`; the undisturbed run of each ZeRO stage is made once."""

    def __init__(self, work: Path):
        self.work = work
        self.preset = write_small_shards(work / "shards")
        self.outcomes: list[Outcome] = []
        self._whole: dict[int, Path] = {}

    def whole(self, stage: int) -> Path:
        """Return the run folder of the undisturbed training."""
        if stage not in self._whole:
            folder = self.work / f"whole-{stage}"
            start(2, *self._arguments(stage, folder / "run"), cwd=folder).finish()
            self._whole[stage] = folder / "run"
        return self._whole[stage]

    def _arguments(self, stage: int, run: Path, *settings: str) -> tuple[str, ...]:
        preset = ("--preset", str(self.preset))
        return ("--ds_config", f"zero{stage}.json", *preset, f"run.dir={run}", *SETTINGS, *settings)

    def run(self, injection: Injection) -> Outcome:
        """Start a run, strike, check what remains, resume, compare."""
        outcome = Outcome(injection)
        self.outcomes.append(outcome)
        folder = self.work / f"fault-{len(self.outcomes):02d}"
        with ExitStack() as stack:
            target = Target(folder / "run", self.preset, self.whole(injection.stage), stack)
            settings = (*injection.settings, f"data.path={target.data_path(injection)}")
            ds_config = ("--ds_config", f"zero{injection.stage}.json")
            resume = (*ds_config, "--resume", "latest", f"run.dir={target.run}", *settings, "train.patience=30")
            target.resume_arguments = resume
            if injection.disk is not None:
                target.limit_disk(injection.disk)
            arguments = self._arguments(injection.stage, target.run, *settings)
            target.job = start(2, *arguments, cwd=folder, launched=injection.launched)
            stack.callback(target.job.kill)
            try:
                outcome.happened = injection.strike(target)
            except RuntimeError as error:
                outcome.broken.append(f"the fault did not come about: {error}")
                return outcome
            wait_for_end(target.job, outcome, target.ends_by_itself)
            outcome.resumed_from = saved_step(target.run) or 0  # without a checkpoint the run starts again
            outcome.lost = last_step(target.run) - outcome.resumed_from
            if outcome.lost > injection.promised:
                outcome.broken.append(f"{outcome.lost} steps lost, {injection.promised} promised")
            for repair in target.repairs:
                repair()
            resumed = start(2, *resume, cwd=folder)
            stack.callback(resumed.kill)
            try:
                resumed.finish()
            except RuntimeError as error:
                outcome.broken.append(f"does not resume: {resumed.last_words() or str(error)[-300:]}")
            outcome.difference = curve_difference(target.whole, target.run)
            if not outcome.difference <= TOLERANCE:
                outcome.broken.append(f"another curve: {outcome.difference:.1e}")
        return outcome


def wait_for_end(job: Job, outcome: Outcome, all_end: bool) -> None:
    """Wait until every process of the run has ended, or one rank if not `all_end`, and judge exit codes and message."""
    injection, struck = outcome.injection, time.monotonic()
    if all_end:
        outcome.exit_codes = job.wait(injection.bound)
        if injection.launched and job.remaining():
            outcome.message = "(the ranks go on without it)"
        job.wait_for_remaining(injection.bound)
    else:
        while job.alive() and time.monotonic() - struck < injection.bound:
            time.sleep(0.05)
        outcome.exit_codes = [process.poll() for process in job.started]
    outcome.seconds_to_end = time.monotonic() - struck
    hanging = job.remaining() if all_end or job.alive() else []
    if hanging:
        outcome.broken.append(f"{len(hanging)} processes hang for more than {injection.bound:.0f} s")
    job.kill()
    outcome.message = outcome.message or job.last_words()
    silent = any(outcome.exit_codes) and set(outcome.exit_codes) != {-9} and not outcome.message
    if silent and not injection.documented:
        outcome.broken.append("no message")


def table(outcomes: list[Outcome]) -> Table:
    made = Table(title="faults: two ranks, fp32, small shards", show_lines=True)
    for column in ("fault", "event", "exit codes", "ended after", "message", "lost", "difference", "verdict"):
        made.add_column(column, overflow="fold")
    for outcome in outcomes:
        made.add_row(
            str(outcome.injection),
            outcome.happened,
            ", ".join("stands" if code is None else str(code) for code in outcome.exit_codes),
            f"{outcome.seconds_to_end:.1f} s",
            outcome.message,
            f"{outcome.lost} of at most {outcome.injection.promised} steps, resumed at {outcome.resumed_from}",
            f"{outcome.difference:.1e}",
            "kept" if not outcome.broken else "BROKEN: " + "; ".join(outcome.broken),
        )
    return made


def summary(outcomes: list[Outcome]) -> list[str]:
    """Return a few lines for results.md."""
    judged = [outcome for outcome in outcomes if not outcome.injection.documented]
    free, others = (
        [outcome.lost for outcome in judged if outcome.injection.promised == promised] for promised in (0, SAVE_EVERY)
    )
    saves = [outcome.happened for outcome in outcomes if "in a save" in outcome.injection.name]
    difference = max(outcome.difference for outcome in outcomes)
    broken = [f"- BROKEN: {outcome.injection}: {'; '.join(outcome.broken)}" for outcome in outcomes if outcome.broken]
    return [
        f"- {len(outcomes)} faults, {len(broken)} with broken promises",
        f"- steps lost, with a save every {SAVE_EVERY}: {sum(free)} by the {len(free)} faults that may cost none "
        "(signals to stop, one full disk, a second run, a server that comes back), at most "
        f"{max(others, default=0)} by each other fault",
        f"- largest difference of a loss or gradient norm from the undisturbed run: {difference:.1e}",
        f"- all processes ended within {max(outcome.seconds_to_end for outcome in judged):.0f} s of the fault",
        f"- {len(saves)} kills in a save; {sum('cut to' in event for event in saves)} of these files were cut by hand, "
        "the others caught in the write",
        *broken,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="faults whose name contains one of these words")
    parser.add_argument("--record", action="store_true", help="write the summary to tests/drills/results.md")
    parser.add_argument("--keep", type=Path, help="a new folder for all runs (default: a temporary one)")
    args = parser.parse_args()
    chosen = [i for i in INJECTIONS if args.only is None or any(word in i.name for word in args.only)]
    with tempfile.TemporaryDirectory(prefix="agrepa-faults-") as scratch:
        drill = FaultDrill(args.keep or Path(scratch))
        for number, injection in enumerate(chosen, 1):
            outcome = drill.run(injection)
            verdict = "; ".join(outcome.broken) or "kept"
            print(f"{number}/{len(chosen)} {injection}: {outcome.happened}; {verdict}", flush=True)
    Console(width=180).print(table(drill.outcomes))
    if args.record:
        record("Faults", "python -m tests.drills.faults", summary(drill.outcomes))
    if any(outcome.broken for outcome in drill.outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
