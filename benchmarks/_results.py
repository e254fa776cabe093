"""Print tables, and write the summaries of results/ with command, machine and commit. Puts the checkout on sys.path: a
GPU machine has the checkout, not always the installed package."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
SUMMARY_WIDTH = 190  # columns of a line in results/
sys.path.insert(0, str(ROOT))


def run_program(main: Callable[[], None]) -> None:
    """Call `main`. Print the line of a UserError and exit with code 2, as commands do."""
    from agrepa_fast.errors import UserError  # the checkout is on sys.path by now

    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def print_table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    cells = [tuple(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def commit() -> str:
    """Return the commit, marked -dirty if the code (not the results) differs from it. AGREPA_COMMIT names it where the
    checkout came without git."""
    if "AGREPA_COMMIT" in os.environ:
        return os.environ["AGREPA_COMMIT"]
    if shutil.which("git") is None:
        return "unknown"
    head, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "agrepa_fast", "kernels", "csrc"])
    )
    return (head or "unknown") + ("-dirty" if changed else "")


def machine() -> dict[str, str]:
    """Return the device, versions, backend, threads and commit of this run."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = "none"
    from agrepa_fast.kernels import active_backend

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "backend": active_backend(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "commit": commit(),
    }


def device_name() -> str:
    """Return `cpu` or the GPU's name, for file names."""
    return torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def write_json(name: str, results: dict, out: str | Path | None = None) -> Path:
    """Write a summary with its command, machine and commit, to `out` or results/<name>_<device>.json. Returns the path.

    Floats keep four digits, timings become [median, p20, p80] in ms, and each record that fits stands on one line.
    """
    path = Path(out) if out else RESULTS / f"{name}_{device_name()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = sys.argv
    for option in {"--out", "--shards"} & set(arguments):  # where files are does not change the numbers
        del arguments[(at := arguments.index(option)) : at + 2]
    command = " ".join(["python", f"benchmarks/{Path(script).name}", *arguments])
    path.write_text(_as_lines(_shortened({"command": command, "machine": machine(), **results})) + "\n")
    return path


def _shortened(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, (list, tuple)):
        return [_shortened(part) for part in value]
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if "median_s" in value:
        value = {"ms": [1e3 * value.pop(f"{point}_s") for point in ("median", "p20", "p80")], **value}
    return {str(key): _shortened(part) for key, part in value.items()}


def _as_lines(value, indent: int = 0) -> str:
    line = json.dumps(value)
    if len(line) + indent <= SUMMARY_WIDTH or not isinstance(value, (dict, list)):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_as_lines(part, indent + 1)}" for key, part in value.items()]
    else:
        parts = [_as_lines(part, indent + 1) for part in value]
    space = "\n" + " " * (indent + 1)
    return line[0] + space + f",{space}".join(parts) + "\n" + " " * indent + line[-1]
