"""Measure all that needs a GPU, unattended, in under 8 minutes: ceilings, accuracy, operations, block, FoG-A, step.

python benchmarks/gpu_suite.py [--parts NAME ...] [--budget SECONDS] [--out FILE] [--dry-run]

Needs torch, triton and numpy and no installed package; the part `accuracy` also needs pip install -e '.[test]'. Each
part runs in a process of its own with a time limit, so a part that fails or dies does not stop the others. Results are
written after each part. Exit code: 0, 1 if a part failed, 2 without a GPU. --dry-run runs all parts on the CPU at tiny
sizes, in one process: it shows that the code runs, and its numbers mean nothing.
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
from contextlib import suppress
from pathlib import Path

import bench_block
import torch
from _bench import OP_HEADER, op_rows
from _results import RESULTS, device_name, print_table, write_json
from _timing import milliseconds

RESERVE = 5  # seconds below which a part is not started
LOG_LINES = 15
LIMITS = {  # seconds per part, in the order of the run: the most important first
    "ceilings": 40,
    "accuracy": 110,
    "block": 120,
    "step": 90,
    "foga": 50,
    "ops": 110,
    "alignment": 50,
    "released": 50,
    "sdpa": 40,
    "zero2": 60,
}


def run_parts(names: list[str], dry_run: bool, seconds: float) -> dict[str, dict]:
    """Run parts in a process of their own and return the results per part, with `status`, `log` (empty if ok) and the
    `seconds` of the process. Results up to a crash or a time-out are kept."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "results.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--in-process", *names, "--out", str(file), *["--dry-run"] * dry_run]
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
    took = {"seconds": round(time.perf_counter() - start, 1)}
    return {name: {"status": end, "log": said} | results.get(name, {}) | took for name in names}


def stop(process: subprocess.Popen) -> None:
    """End a process group by its leader."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_in_process(names: list[str], dry_run: bool, file: Path) -> None:
    """Run parts in this process, and write the results after each measurement."""
    import _gpu_parts

    plan = _gpu_parts.DRY if dry_run else _gpu_parts.Plan()
    results = {}
    for name in names:
        part = results[name] = {}
        try:
            for key, value in _gpu_parts.PARTS[name](plan):
                part[key] = value
                write(results, file)
            part |= {"status": "ok", "log": []}
        except Exception as error:  # the other parts still run
            part |= {
                "status": f"failed, {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                "log": traceback.format_exc().splitlines()[-LOG_LINES:],
            }
        write(results, file)


def write(results: dict, file: Path) -> None:
    """Write the results by a rename, so that the file is whole at any time."""
    made = file.with_suffix(".new")
    made.write_text(json.dumps(results))
    made.replace(file)


def show(results: dict) -> None:
    """Print the tables of a run."""
    for name in ("ops", "alignment"):
        timed = {op: r for op, r in results.get(name, {}).items() if isinstance(r, dict) and "fused" in r}
        print_table(name, ("operation", *OP_HEADER[1:]), [row for op, r in timed.items() for row in op_rows(op, r)])
    blocks = {label: r for label, r in results.get("block", {}).items() if isinstance(r, dict)}
    print_table("block", bench_block.HEADER, [row for label, r in blocks.items() for row in bench_block.rows(label, r)])
    rows = []
    for name in ("step", "foga", "released", "sdpa", "zero2"):
        for key, value in results.get(name, {}).items():
            timing = value.get("both", value) if isinstance(value, dict) else {}
            if "median_s" in timing:
                clips = f"{value['clips_per_s']:.1f}" if "clips_per_s" in value else ""
                rate = f"{value['tflop_per_s']:.0f}" if "tflop_per_s" in value else ""
                memory = f"{value['peak_memory_mib']:.0f}" if "peak_memory_mib" in value else ""
                rows.append((name, key, milliseconds(timing), clips, rate, memory))
            elif isinstance(value, dict):
                rows.append((name, key, value.get("wrong", ""), "", "", ""))
    print_table("steps, probes, attention", ("part", "what", "ms (p20 to p80)", "clips/s", "TFLOP/s", "MiB"), rows)
    for name, tests in results.get("accuracy", {}).items():
        if isinstance(tests, dict):
            print(f"accuracy, {name}: {tests['passed']} passed, {len(tests['failed'])} failed")
            for failure in tests["failed"][:3]:
                print(f"  {failure}")
    print_table("parts", ("part", "status", "s"), [(name, r["status"], r["seconds"]) for name, r in results.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--budget", type=float, default=460, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu_<device>.json)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: does the code run?")
    parser.add_argument("--in-process", nargs="+", choices=LIMITS, help=argparse.SUPPRESS)  # how a part is started
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_suite.py: PyTorch sees no GPU here, nothing was measured (--dry-run tries the code on the CPU)")
        sys.exit(2)
    if args.in_process:
        run_in_process(args.in_process, args.dry_run, args.out)
        return
    out = args.out or RESULTS / f"gpu_{device_name()}.json"
    if args.dry_run and args.out is None:
        out = Path(tempfile.mkdtemp()) / "gpu_dry_run.json"
    start, results = time.perf_counter(), {}
    for names in [args.parts] if args.dry_run else [[name] for name in args.parts]:
        left = args.budget - (time.perf_counter() - start)
        if left < RESERVE:
            results |= {name: {"status": "not run: the budget is spent", "seconds": 0.0} for name in names}
        else:
            print(f"{' '.join(names)} ...", flush=True)
            results |= run_parts(names, args.dry_run, min(left, sum(LIMITS[name] for name in names)))
        write_json("gpu", {"dry_run": args.dry_run, "results": results}, out)
    show(results)
    print(f"\nwrote {out} after {time.perf_counter() - start:.0f} s")
    if args.dry_run:
        print("dry run: tiny sizes on the CPU, none of these numbers means anything")
    sys.exit(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    main()
