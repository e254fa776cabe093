"""Plant the faults of faults.py and attribution_faults.py, one at a time, in a copy of the tree, and see tests fail.

Writes tests/plant_faults.json. Exits with 1 when a fault survives or cannot be planted, or when an operation has fewer
than six. Not a test itself: it takes minutes.

    python tests/plant_faults.py [--only ada_norm ...]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attribution_faults import FAULTS as ATTRIBUTION_FAULTS
from faults import FAULTS as KERNEL_FAULTS

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("plant_faults.json")
LEAST, SECONDS = 6, 300
FAULTS = KERNEL_FAULTS | ATTRIBUTION_FAULTS

# setup.py as it is, but objects that are newer than all they are made of stay.
BUILD = """
import pathlib, runpy, sys
from setuptools._distutils.unixccompiler import UnixCCompiler as Compiler
compile = Compiler._compile
def needed(self, obj, source, *rest):
    made = pathlib.Path(obj)
    parts = [source, *pathlib.Path(source).parent.glob("*.h")]
    if not made.exists() or made.stat().st_mtime_ns < max(pathlib.Path(p).stat().st_mtime_ns for p in parts):
        compile(self, obj, source, *rest)
Compiler._compile = needed
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def copy_tree(to: Path) -> None:
    """All source files, tracked and untracked."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def run_python(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python in the copy, which is imported before any installed agrepa_fast; no bytecode, whose time stamps are too
    coarse for edits this quick."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


def build(tree: Path) -> None:
    done = run_python(tree, "-c", BUILD)
    if done.returncode or "error:" in done.stderr:  # setup.py goes on without the library
        raise RuntimeError(f"the CPU library does not build:\n{done.stderr[-2000:]}")


def assert_imports_the_copy(tree: Path) -> None:
    done = run_python(tree, "-c", "import agrepa_fast.kernels as k; print(k.__file__, k._native.LIBRARY._name)")
    for name in done.stdout.split():
        assert Path(name).is_relative_to(tree), f"{name} is not in {tree}"
    assert done.stdout, done.stderr


@contextmanager
def planted(tree: Path, file: str, old: str, new: str) -> Iterator[None]:
    """The copy with the replacement made, and the CPU library built from it. Raises ValueError unless `old` is there
    exactly once."""
    path, library = tree / file, tree / "kernels/_cpu.so"
    text, built = path.read_text(), library.read_bytes()
    if text.count(old) != 1:
        raise ValueError(f"{old!r} is {text.count(old)} times in {file}, wanted once")
    try:
        path.write_text(text.replace(old, new))
        if file.startswith("csrc/"):
            build(tree)
        yield
    finally:
        path.write_text(text)
        library.write_bytes(built)


def failure(tree: Path, operation: str) -> str | None:
    """What the operation's tests report: the first that failed, or None when all pass. Raises RuntimeError when they
    did not run."""
    try:
        done = run_python(tree, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{operation}.py")
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    if done.returncode == 1 and (failed := re.search(r"^FAILED \S*?::(.+?)(?: - |$)", done.stdout, re.M)):
        return failed[1]
    if done.returncode:
        raise RuntimeError(f"test_{operation}.py did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return None


def plant(tree: Path, operation: str) -> list[dict]:
    """The record of every fault of an operation."""
    if broken := failure(tree, operation):
        raise RuntimeError(f"test_{operation}.py fails without any fault: {broken}")
    records = []
    for file, old, new, what in FAULTS[operation]:
        record = {"file": file, "fault": what, "caught_by": None}
        try:
            with planted(tree, file, old, new):
                record["caught_by"] = failure(tree, operation)
        except (RuntimeError, ValueError) as error:
            record["error"] = str(error)
        verdict = record.get("error") or (f"caught by {record['caught_by']}" if record["caught_by"] else "SURVIVED")
        print(f"{operation}: {file}: {what}: {verdict}", flush=True)
        records.append(record)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    args = parser.parse_args()

    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory(prefix="agrepa_faults_") as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        build(tree)
        assert_imports_the_copy(tree)
        for operation in args.only:
            records[operation] = plant(tree, operation)
    RECORD.write_text(json.dumps({name: records[name] for name in sorted(records)}, indent=1) + "\n")

    survived = [record for name in args.only for record in records[name] if not record["caught_by"]]
    scarce = [name for name in args.only if len(records[name]) < LEAST]
    total = sum(len(records[name]) for name in args.only)
    print(f"{total - len(survived)} of {total} faults caught; fewer than {LEAST}: {', '.join(scarce) or 'none'}")
    return 1 if survived or scarce else 0


if __name__ == "__main__":
    sys.exit(main())
