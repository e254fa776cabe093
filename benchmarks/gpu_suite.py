"""Decide what only a GPU can, unattended, in under 8 minutes: does it all work, what is fastest, and is it fast enough.

python benchmarks/gpu_suite.py [--out FOLDER] [--shards FOLDER] [--parts NAME ...] [--budget SECONDS] [--dry-run]

Installs nothing. Each part runs in a process of its own with a time limit, so a part that fails or dies does not stop
the others; a part alone has the whole budget. The folder gets the results after each part, a trace and the longest
kernels of a step; the last table says what was decided. Exit code: 0, 1 if a part failed, 2 without a GPU. --dry-run
runs all parts on the CPU at tiny sizes, in one process: it shows that the code runs, and its numbers mean nothing.
gpu_once.sh packs what a bare machine lacks.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import bench_block
import bench_fuse
import torch
from _bench import OP_HEADER, gpu_cells, op_rows
from _decisions import HEADER, decide
from _results import ROOT, device_name, print_table, write_json
from _timing import milliseconds

RESERVE = 5  # seconds below which a part is not started
LOG_LINES = 15
LIMITS = {  # seconds per part, in the order of the run: the most important first
    "demo": 90,
    "accuracy": 110,
    "zero2": 70,
    "ceilings": 25,
    "tiles": 60,
    "attention": 35,
    "block": 110,
    "step": 80,
    "foga": 40,
    "traces": 50,
    "ops": 80,
    "alignment": 50,
    "fuse": 80,
}


def run_part(name: str, arguments: list[str], out: Path, seconds: float) -> dict[str, object]:
    """Run a part in a process of its own and return its results, with `status`, `log` (empty if ok) and the `seconds`
    of the process. Results up to a crash or a time-out are kept."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "results.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--in-process", str(file), "--parts", name, "--out", str(out), *arguments]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                end = f"died, exit code {process.wait(timeout=seconds)}"
            except subprocess.TimeoutExpired:
                end = f"stopped after {seconds:.0f} s"
            finally:
                stop(process)
        results = json.loads(file.read_text()) if file.exists() else {}
        said = log.read_text().strip().splitlines()[-LOG_LINES:]
    return {"status": end, "log": said} | results | {"seconds": round(time.perf_counter() - start, 1)}


def stop(process: subprocess.Popen) -> None:
    """End a process group by its leader."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_whole(file: Path, results: dict) -> None:
    """Write the results by a rename, so that the file is whole at any time."""
    made = file.with_suffix(".new")
    made.write_text(json.dumps(results))
    made.replace(file)


def show(results: dict) -> None:
    """Print the tables of a run, the decisions last."""
    for name in ("ops", "alignment"):
        timed = {op: r for op, r in results.get(name, {}).items() if isinstance(r, dict) and "fused" in r}
        print_table(name, ("operation", *OP_HEADER[1:]), [row for op, r in timed.items() for row in op_rows(op, r)])
    blocks = {label: r for label, r in results.get("block", {}).items() if isinstance(r, dict)}
    print_table("block", bench_block.HEADER, [row for label, r in blocks.items() for row in bench_block.rows(label, r)])
    fused = {label: r for label, r in results.get("fuse", {}).items() if isinstance(r, dict)}
    print_table("fuse", bench_fuse.HEADER, [row for label, r in fused.items() for row in bench_fuse.rows(label, r)])
    rows = []
    for part in ("zero2", "attention", "step", "foga"):
        for key, value in results.get(part, {}).items():
            methods = (
                {f"{key}, {name}": v for name, v in value.items()}
                if part == "attention" and isinstance(value, dict)
                else {key: value}
            )
            rows += [
                (part, name, *time_cells(timed))
                for name, timed in methods.items()
                if isinstance(timed, dict) and time_cells(timed)
            ]
    print_table(
        "steps, attention, probes", ("part", "what", "ms (p20 to p80)", "clips/s", "TFLOP/s", "CPU ms", "MiB"), rows
    )
    for name, tests in results.get("accuracy", {}).items():
        for failure in tests["failed"][:3] if isinstance(tests, dict) else ():
            print(f"accuracy, {name}: {failure}")
    print_table("parts", ("part", "status", "s"), [(name, r["status"], r["seconds"]) for name, r in results.items()])
    print_table("decisions", HEADER, decide(results))


def time_cells(result: dict) -> tuple[str, ...]:
    """Return the cells of a timing, or none if the result is no timing."""
    if "wrong" in result:
        return f"wrong: {result['wrong'][:80]}", "", "", "", ""
    timing = result.get("both", result)
    if "median_s" not in timing:
        return ()
    rates = (f"{result[name]:.1f}" if name in result else "" for name in ("clips_per_s", "tflop_per_s"))
    return milliseconds(timing), *rates, *gpu_cells(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--budget", type=float, default=465, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_suite", help="folder of the results")
    parser.add_argument("--shards", default="data/demo", help="folder of the demo's shards")
    parser.add_argument("--preset", default="demo", help="of the run in part demo")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: does the code run?")
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)  # how a part is started: where results go
    return parser.parse_args()


def run_here(name: str, args: argparse.Namespace, write: Callable[[dict], None] = lambda _: None) -> dict[str, object]:
    """Run a part in this process and return its results, with `status`, `log` and `seconds`; write(results) is called
    after each of them."""
    import _gpu_parts
    import _gpu_steps
    from _plan import Plan, dry_plan

    plan = (dry_plan if args.dry_run else Plan)(args.out, shards=args.shards, preset=args.preset)
    part, start, results = (_gpu_steps.PARTS | _gpu_parts.PARTS)[name], time.perf_counter(), {}
    try:
        for key, value in part(plan):
            results[key] = value
            write(results)
        results |= {"status": "ok", "log": []}
    except Exception as error:  # the other parts still run
        results |= {
            "status": f"failed, {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            "log": traceback.format_exc().splitlines()[-LOG_LINES:],
        }
    write(results)
    return results | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    args = parse()
    if args.in_process:
        run_here(*args.parts, args, partial(write_whole, args.in_process))
        return
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_suite.py: PyTorch sees no GPU here, nothing was measured (--dry-run tries the code on the CPU)")
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    summary = args.out / f"gpu_{'dry_run' if args.dry_run else device_name()}.json"
    arguments = ["--shards", args.shards, "--preset", args.preset, *["--dry-run"] * args.dry_run]
    start, results = time.perf_counter(), {}
    for name in args.parts:
        left = args.budget - (time.perf_counter() - start)
        if left < RESERVE:
            results[name] = {"status": "not run: the budget is spent", "seconds": 0.0}
        else:
            print(f"{name} ...", flush=True)
            limit = left if len(args.parts) == 1 else min(left, LIMITS[name])
            results[name] = run_here(name, args) if args.dry_run else run_part(name, arguments, args.out, limit)
        write_json("gpu", {"dry_run": args.dry_run, "results": results}, summary)
    show(results)
    print(f"\nwrote {summary} after {time.perf_counter() - start:.0f} s")
    if args.dry_run:
        print("dry run: tiny sizes on the CPU, none of these numbers means anything")
    sys.exit(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    main()
