"""The CPU library's build: with a compiler, and without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("agrepa_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def test_builds_a_library_that_does_not_bring_its_own_openmp(tmp_path):
    """Two OpenMP runtimes in one process keep two pools of threads that fight for the cores."""
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    library = tmp_path / "kernels" / "_cpu.so"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "gomp" not in needed


def test_without_a_compiler_everything_else_is_installed_and_it_says_so(tmp_path):
    done = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "The CPU library is left out: install a C++17 compiler" in done.stdout + done.stderr
    assert not (tmp_path / "kernels" / "_cpu.so").exists()
