"""The CPU library as it was built, and an installation without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_library_does_not_bring_its_own_openmp():
    """Two OpenMP runtimes in one process keep two pools of threads, which compete for the cores."""
    command = ["readelf", "-d", ROOT / "kernels" / "_cpu.so"]
    assert "gomp" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_without_a_compiler_everything_else_is_installed_and_it_says_so(tmp_path):
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("agrepa_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The CPU library is left out: install a C++17 compiler" in done.stdout + done.stderr
    assert not (tmp_path / "kernels" / "_cpu.so").exists()
