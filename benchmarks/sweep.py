"""Train a preset with several settings and seeds, and compare validation flow losses by steps and by time.

python benchmarks/sweep.py NAME LABEL:section.field=value,… … [--seeds 0,1,2] [--preset demo] [--goal LOSS]
    [section.field=value …]

Runs go to runs/sweep/NAME, one process each, through the real launcher. The same command goes on after an interruption,
and may name more arms and seeds. Finished runs are not repeated: take another NAME after a change of the code. The
table goes to benchmarks/results/sweep_NAME.json; differences are to the first arm, with a 95 % interval over seeds.
`agrepa compare` compares strategies, from one warm-up per seed and by sound.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from math import isfinite, log
from operator import mul
from pathlib import Path
from statistics import mean

import numpy as np
from _results import RESULTS, print_table, run_program, write_json

from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.intervals import mean_interval
from agrepa_fast.evaluation.jobs import Job, run_jobs, split_overrides, training_job, write_plan

CONFIDENCE = 0.95
# Arms and overrides may say otherwise.
FLOW_ALONE = ("align.strategy=none", "align.bitc_speech=0", "align.bitc_audio=0")


def read_losses(folder: Path) -> dict[int, float]:
    """Return the validation flow loss of the weights by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["val/flow_loss"] for line in lines if "val/flow_loss" in line}


def step_of(losses: dict[int, float], goal: float) -> float | None:
    """Return the step at which the loss first reaches `goal`, None if never: between two validations the logarithm of
    the loss is taken as linear."""
    before = None
    for step, loss in losses.items():
        if loss <= goal:
            if before is None:
                return float(step)
            start, higher = before
            return start + (step - start) * log(higher / goal) / log(higher / loss)
        before = step, loss
    return None


def summarise(folders: Sequence[Path], goal: float | None) -> dict:
    """Return an arm's loss by step, the range of its last one over seeds, and the time of a step and to `goal`; means
    over seeds. None for a goal that a seed does not reach, and for times if a run was resumed after its last step,
    which was timed by nobody then."""
    runs = [read_losses(folder) for folder in folders]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    last = [summary["val/flow_loss"]["last"] for summary in summaries]
    counted = [summary["steps"] - summary["seconds_since_step"] for summary in summaries]
    timed = 0 not in counted
    seconds = [s["seconds"]["train"] / steps for s, steps in zip(summaries, counted, strict=True)] if timed else []
    reached = [None if goal is None else step_of(run, goal) for run in runs]
    every = None not in reached
    return {
        "loss": {step: mean(run[step] for run in runs) for step in runs[0] if step},
        "last": last,  # by seed
        "range": max(last) - min(last),
        "ema": mean(summary["val/flow_loss"]["ema"] for summary in summaries),
        "s_per_step": mean(seconds) if timed else None,
        "s_per_step_by_seed": seconds,
        "steps_to_goal": mean(reached) if every else None,
        "s_to_goal": mean(map(mul, reached, seconds)) if every and timed else None,
    }


def difference(last: Sequence[float], first: Sequence[float]) -> dict:
    """Return the mean difference of two arms' last losses, seed by seed, with its t interval over seeds: None for the
    ends if there is one seed."""
    found = mean_interval(np.subtract(last, first), CONFIDENCE)
    low, high = (end if isfinite(end) else None for end in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high}


def check_precision(folders: Sequence[Path]) -> None:
    """Raise UserError if the runs were trained in different precisions: on a CPU each run with train.precision=auto
    measures for itself whether bf16 is worth it."""
    of = {json.loads((folder / "summary.json").read_text())["precision"]: folder.name for folder in folders}
    if len(of) > 1:
        found = ", ".join(f"{folder} in {precision}" for precision, folder in sorted(of.items()))
        raise UserError(f"runs of different precisions do not compare ({found}): set train.precision, with a new NAME")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--goal", type=float, help="loss whose steps and seconds are compared")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/sweep_NAME.json)")
    parser.add_argument("arms", nargs="+", metavar="LABEL:section.field=value,… or section.field=value")
    args = parser.parse_intermixed_args()
    labelled = [text for text in args.arms if ":" in text.partition("=")[0]]
    arms = {label: split_overrides(settings) for label, _, settings in (text.partition(":") for text in labelled)}
    overrides = [text for text in args.arms if text not in labelled]
    seeds = args.seeds.split(",")
    labels = [text.partition(":")[0] for text in labelled]
    for name, values in (("--seeds", seeds), ("the arms", labels)):
        if repeated := [value for value in values if values.count(value) > 1]:
            raise UserError(f"{name}: {repeated[0]} twice")
    if not arms:
        raise UserError("no arm: name one as LABEL:section.field=value, or LABEL: alone for the preset as it is")
    folder = Path("runs/sweep") / args.name

    runs: dict[str, list[Path]] = {label: [] for label in arms}
    jobs: list[Job] = []
    auto = False
    for seed in seeds:
        for label in arms:
            run = folder / f"{label}-seed{seed}"
            runs[label].append(run)
            settings = (*FLOW_ALONE, *overrides, *arms[label], f"run.seed={seed}")
            # A wrong setting ends here: a plan with it would refuse the corrected command.
            auto |= load_config(args.preset, settings).train.precision == "auto"
            # steps=1: all count alike in the time left
            jobs.append(training_job(f"{label}, seed {seed}", run, ("--preset", args.preset, *settings), steps=1))
    write_plan(jobs, folder / "plan.json", "take another NAME")
    if failed := run_jobs(jobs, print):
        sys.exit(f"{len(failed)} of {len(jobs)} runs failed, {failed[0].name} first: the same command tries again")

    if auto:
        check_precision([job.folder for job in jobs])
    table = {label: {"settings": arms[label], **summarise(runs[label], args.goal)} for label in arms}
    first = next(iter(arms))
    for label, arm in table.items():
        arm["to_first"] = None if label == first else difference(arm["last"], table[first]["last"])
    out = args.out or RESULTS / f"sweep_{args.name}.json"
    out = write_json(f"sweep_{args.name}", {"seeds": seeds, "goal": args.goal, "arms": table}, out)
    steps = sorted({step for arm in table.values() for step in arm["loss"]})
    header = ("arm", *steps, "range", "EMA", "s per step", f"steps to {args.goal}", "seconds", f"to {first}")
    rows = []
    for label, arm in table.items():
        losses = (*map(arm["loss"].get, steps), arm["range"], arm["ema"], arm["s_per_step"])
        to_goal = ("" if arm[name] is None else f"{arm[name]:.0f}" for name in ("steps_to_goal", "s_to_goal"))
        cells = ("" if loss is None else f"{loss:.3f}" for loss in losses)
        rows.append((label, *cells, *to_goal, _signed(arm["to_first"])))
    print_table(f"validation flow loss, mean over seeds {args.seeds}", header, rows)
    print("wrote", out)


def _signed(found: dict | None) -> str:
    """Return the text of a difference and, with several seeds, its interval."""
    if found is None:
        return ""
    ends = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['value']:+.3f}{ends}"


if __name__ == "__main__":
    run_program(main)
