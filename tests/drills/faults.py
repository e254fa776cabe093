"""What a run survives: every fault is injected into a run of its own, which is then resumed and compared with the
uninterrupted one. Small random shards, two ranks, fp32.

python benchmarks/faults.py [--only WORD ...] [--out FILE] [--keep FOLDER]

Promises: SIGKILL loses the steps since the last complete checkpoint, a signal to stop loses nothing, every process ends
within a minute, and the resumed curve equals the uninterrupted one to 1e-5. Exits with 1 when a row breaks them. Disk
full needs root (a tmpfs).
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from _bench import write_json
from _fault_rows import SAVE_EVERY, STEPS, Fault, Scene, rows
from _processes import BOUND, Job, last_words, saved_step, start, steps_done
from rich.console import Console
from rich.table import Table

from tests.testing import metrics, write_small_shards

TOLERANCE = 1e-5
SETTINGS = (
    *(f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", f"train.val_every={STEPS}", "train.log_every=1"),
    *("align.strategy=random", "train.precision=fp32", "flow.steps=1", "eval.clips=1", "probe.clips=1"),
)


@dataclass
class Row:
    """What one fault did."""

    fault: str
    stage: int
    happened: str = ""
    exit_codes: list[int | None] = field(default_factory=list)
    seconds_to_end: float = 0.0  # of all processes, after the fault
    message: str = ""
    done: int = 0  # steps that were done
    resumed_from: int | None = None
    lost: int = 0
    promised: int = 0  # at most
    difference: float = float("inf")  # largest of any loss or gradient norm of any step
    wrong: list[str] = field(default_factory=list)


def arguments(stage: int, run: Path, preset: Path, *settings: str) -> tuple[str, ...]:
    return ("--ds_config", f"zero{stage}.json", "--preset", str(preset), f"run.dir={run}", *SETTINGS, *settings)


def uninterrupted(stage: int, preset: Path, work: Path, known: dict[int, Path]) -> Path:
    """The run folder of the same training without a fault, without loader processes; made once."""
    if stage not in known:
        folder = work / f"whole-{stage}"
        finish(start(2, *arguments(stage, folder / "run", preset), cwd=folder))
        known[stage] = folder / "run"
    return known[stage]


def finish(job: Job) -> None:
    """Wait for a run that nothing happens to. RuntimeError, with its output, when it fails."""
    codes = job.end(300)
    job.kill()
    if any(codes):
        raise RuntimeError(f"exit codes {codes}:\n" + "\n".join(output[-3000:] for output in job.outputs()))


def difference(whole: Path, resumed: Path) -> float:
    """Largest difference of losses and gradient norms of any step; infinite when steps or names differ."""
    a, b = (
        {(s, n): v for s, values in metrics(run).items() for n, v in values.items() if n.endswith(("loss", "norm"))}
        for run in (whole, resumed)
    )
    return max(abs(a[key] - b[key]) for key in a) if a and a.keys() == b.keys() else float("inf")


def try_fault(fault: Fault, preset: Path, whole: Path, folder: Path) -> Row:
    """Inject the fault, look at what is left, resume, compare."""
    row = Row(fault.name, fault.stage)
    run = folder / "run"
    with ExitStack() as stack:
        scene = Scene(run, preset, whole, stack)
        settings = (*fault.settings, f"data.path={scene.data_path(fault)}")
        resume = ("--resume", "latest", f"run.dir={run}", *settings, "train.patience=30")
        scene.resume_arguments = resume = ("--ds_config", f"zero{fault.stage}.json", *resume)
        if fault.disk is not None:
            scene.small_disk(fault.disk)
        scene.job = job = start(2, *arguments(fault.stage, run, preset, *settings), cwd=folder, launched=fault.launched)
        stack.callback(job.kill)
        try:
            row.happened = fault.inject(scene)
        except RuntimeError as error:
            row.wrong.append(f"the fault did not come about: {error}")
            return row
        wait_for_end(job, fault, row, scene.ends_by_itself)
        row.message = row.message or last_words(job)
        if not row.message and any(row.exit_codes) and not fault.documented and set(row.exit_codes) != {-9}:
            row.wrong.append("no message")
        row.done, row.resumed_from = steps_done(run), saved_step(run)
        for repair in scene.repairs:
            repair()
        if row.resumed_from is None:
            row.wrong.append("no checkpoint")
            return row
        row.lost, row.promised = row.done - row.resumed_from, fault.promised
        if row.lost > row.promised:
            row.wrong.append("lost more than promised")
        resumed = start(2, *resume, cwd=folder)
        stack.callback(resumed.kill)
        try:
            finish(resumed)
        except RuntimeError as error:
            row.wrong.append(f"does not resume: {last_words(resumed) or str(error)[-300:]}")
        row.difference = difference(whole, run)
        if not row.difference <= TOLERANCE:
            row.wrong.append(f"another curve: {row.difference:.1e}")
    return row


def wait_for_end(job: Job, fault: Fault, row: Row, all_end: bool) -> None:
    """Until every process of the run has ended, or must be ended; not `all_end`: until one rank has."""
    injected = time.monotonic()
    if all_end:
        row.exit_codes = job.end(fault.bound)
        if fault.launched and job.left():
            row.message = "(the ranks go on without it)"
        job.wait_until_left(fault.bound)
    else:
        while job.alive() and time.monotonic() - injected < fault.bound:
            time.sleep(0.05)
        row.exit_codes = [process.poll() for process in job.started]
    row.seconds_to_end = round(time.monotonic() - injected, 1)
    left = job.left() if all_end or job.alive() else []
    if left:
        row.wrong.append(f"{len(left)} processes hang for more than {fault.bound:.0f} s")
    job.kill()


def table(results: list[Row]) -> Table:
    made = Table(title="faults: two ranks, fp32, small shards", show_lines=True)
    for column in ("fault", "what happened", "exit codes", "ended after", "message", "lost", "difference", "verdict"):
        made.add_column(column, overflow="fold")
    for row in results:
        made.add_row(
            f"{row.fault} (ZeRO {row.stage})",
            row.happened,
            ", ".join("stands" if code is None else str(code) for code in row.exit_codes),
            f"{row.seconds_to_end:.1f} s",
            row.message,
            f"{row.lost} of at most {row.promised} steps, resumed at {row.resumed_from}",
            f"{row.difference:.1e}",
            "kept" if not row.wrong else "BROKEN: " + "; ".join(row.wrong),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name holds one of these words")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/faults_<device>.json)")
    parser.add_argument("--keep", type=Path, help="a new folder for all runs (default: a temporary one)")
    args = parser.parse_args()
    console = Console(width=180)
    results: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="agrepa-faults-") as scratch:
        work = args.keep or Path(scratch)
        preset, known = write_small_shards(work / "shards"), {}
        first = uninterrupted(2, preset, work, known)
        chosen = [f for f in rows(first) if args.only is None or any(word in f.name for word in args.only)]
        for number, fault in enumerate(chosen):
            whole = uninterrupted(fault.stage, preset, work, known)
            results.append(try_fault(fault, preset, whole, work / f"fault-{number:02d}"))
            row = results[-1]
            console.print(
                f"{number + 1}/{len(chosen)} {row.fault}: {row.happened}; {row.wrong or 'kept'}", markup=False
            )
    console.print(table(results))
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "bound_s": BOUND, "tolerance": TOLERANCE}
    content = {"settings": settings, "rows": [asdict(row) for row in results]}
    print("wrote", write_json("faults", content, args.out))
    if any(row.wrong for row in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
