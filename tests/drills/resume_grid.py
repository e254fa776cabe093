"""Runs that are continued with other ranks, another ZeRO stage, or both: every pair, in fp32 and bf16.

python benchmarks/resume_grid.py [--precision fp32 bf16] [--out FILE]

A run of 5 steps is saved after step 3 at every stage on 1 and 2 ranks; a copy of it goes on from there at every stage
on 1 and 2 ranks. Written down are the largest difference of any loss of steps 4 and 5 (training and validation) from
the uninterrupted run, and of any averaged weight at the end. In fp32 no loss may differ by more than 1e-5; in bf16
stages round otherwise.
"""

import argparse
import json
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

from _bench import RESULTS, write_json
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from agrepa_fast.training.weights import find_checkpoint
from tests.testing import metrics, start_ranks, write_small_shards

LIMITS = {"fp32": 1e-5, "bf16": 2e-3}
SAVED = 3
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
STAGES = {
    "0": {"zero_optimization": {"stage": 0}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2}},
    "3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "2 offload": {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False},
}


def layout_name(stage: str, ranks: int) -> str:
    """Stage x ranks."""
    return f"{stage} x {ranks}"


def work(jobs: list[dict]) -> None:
    """One rank's part of several trainings in one process: starting it takes longer than they do."""
    import torch.distributed as dist
    import torch.nn.functional as functional

    import agrepa_fast.train
    from agrepa_fast import load_config
    from agrepa_fast.training.engine import start_ranks as join

    join()
    dist.destroy_process_group = lambda: None
    agrepa_fast.train.finish = lambda *_: None  # plots and samples
    linear = functional.linear
    for job in jobs:
        functional.linear = linear  # ZeRO-3 leaves its own behind, which rounds otherwise in bf16
        run = Path(job["run"])
        if job["source"] and dist.get_rank() == 0:
            shutil.copytree(job["source"], run)
        dist.barrier()
        resume = f"step{SAVED:08d}" if job["source"] else None
        source = run / "config.yaml" if resume else job["preset"]
        agrepa_fast.train.train(
            load_config(source, [*job["overrides"], f"run.dir={run}"]), STAGES[job["stage"]], resume
        )


def run_jobs(jobs: list[dict], ranks: int, folder: Path) -> None:
    if not jobs:
        return
    listed = folder / f"jobs-{ranks}.json"
    listed.write_text(json.dumps(jobs))
    processes = start_ranks(ranks, Path(__file__), "--jobs", str(listed), cwd=folder)
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(output[-3000:] for output in outputs))


def loss_difference(run: Path, other: Path) -> float:
    """The largest of any loss after the save."""
    a, b = metrics(run), metrics(other)
    if a.keys() != b.keys():
        raise SystemExit(f"{run} and {other} have other steps")
    names = [(step, name) for step in a if step > SAVED for name in a[step] if "loss" in name]
    return max(abs(a[step][name] - b[step][name]) for step, name in names)


def weight_difference(run: Path, other: Path) -> float:
    """The largest of any averaged weight in the newest checkpoints."""
    a, b = (load_file(find_checkpoint(folder, "latest") / "ema.safetensors") for folder in (run, other))
    return max((a[name] - b[name]).abs().max().item() for name in a.keys() | b.keys())


def measure(precision: str, folder: Path) -> list[dict]:
    preset = str(write_small_shards(folder / "shards"))
    layouts = [*product(STAGES, (1, 2))]
    runs = {layout: folder / f"run-{layout[0]}-{layout[1]}" for layout in layouts}
    overrides = [f"train.precision={precision}", f"train.save_every={SAVED}", "train.keep=9"]
    for ranks in (1, 2):
        run_jobs(
            [
                {"run": str(runs[layout]), "source": None, "preset": preset, "stage": layout[0], "overrides": overrides}
                for layout in layouts
                if layout[1] == ranks
            ],
            ranks,
            folder,
        )
    pairs = {(a, b): folder / f"{a[0]}-{a[1]}-to-{b[0]}-{b[1]}" for a, b in product(layouts, layouts)}
    for ranks in (1, 2):
        run_jobs(
            [
                {"run": str(run), "source": str(runs[a]), "stage": b[0], "overrides": []}
                for (a, b), run in pairs.items()
                if b[1] == ranks
            ],
            ranks,
            folder,
        )
    return [
        {
            "precision": precision,
            "from": layout_name(*a),
            "to": layout_name(*b),
            "loss_difference": loss_difference(runs[a], run),
            "averaged_weight_difference": weight_difference(runs[a], run),
        }
        for (a, b), run in pairs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=LIMITS)
    parser.add_argument("--out", type=Path, default=RESULTS / "resume_grid.json")
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jobs is not None:
        work(json.loads(args.jobs.read_text()))
        return
    cases = []
    for precision in args.precision:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(precision, Path(folder))
        cases += found
        targets = list(dict.fromkeys(case["to"] for case in found))
        table = Table(*["from | to", *targets], title=f"{precision}: largest difference of a loss")
        for start in dict.fromkeys(case["from"] for case in found):
            table.add_row(start, *[f"{case['loss_difference']:.0e}" for case in found if case["from"] == start])
        Console(width=160).print(table)
        write_json("resume_grid", {"saved_after_step": SAVED, "limits": LIMITS, "cases": cases}, args.out)
    wrong = [case for case in cases if not case["loss_difference"] <= LIMITS[case["precision"]]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(cases)} differ by too much: {wrong[0]}")


if __name__ == "__main__":
    main()
