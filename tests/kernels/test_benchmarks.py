"""The benchmarks run, check before they time, and go on when a part fails. No number they print here means anything."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_ada_norm  # noqa: E402
import bench_block  # noqa: E402
import gpu_suite  # noqa: E402
from _bench import compare  # noqa: E402

QUICK = ["--repeats", "2", "--compiler", "aot_eager"]


@pytest.fixture
def program(monkeypatch):
    """Runs a benchmark's script in this process; starting one that imports torch takes seconds."""

    def run(name: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")

    return run


@pytest.mark.parametrize(("name", "operations"), [("gated_residual", 3), ("velocity_change", 1)])
def test_an_operation(name, operations, program, tmp_path):
    program(f"bench_{name}.py", "--shapes", "64,7,2", *QUICK, "--out", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["command"].startswith(f"python benchmarks/bench_{name}.py --shapes 64,7,2")
    assert {"device", "torch", "triton", "backend", "commit"} <= written["machine"].keys()
    assert len(written["results"]) == operations
    for methods in (shapes["64, 7, 2"] for shapes in written["results"].values()):
        assert list(methods) == ["fused", "torch.compile", "eager"]
        for result in methods.values():
            median, low, high = result["forward"]["ms"]
            assert low <= median <= high
            assert ("backward" in result) == (name == "gated_residual")


def test_the_block(program, tmp_path, capsys):
    program("bench_block.py", "--shapes", "128,9,1", *QUICK, "--profile", "--out", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    results = written["results"]["128, 9, 1"]
    assert list(results)[:4] == ["released", "eager", "torch.compile", "ours"]
    assert results["released"]["over_released"] == 1
    assert "ours, three forwards and backwards" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed():
    def off(x, modulation):
        """2 % on dscale and dshift, outputs right."""
        return bench_ada_norm.OP.fused(x, modulation + 0.02 * (modulation - modulation.detach()))

    results = compare(replace(bench_ada_norm.OP, fused=off), (32, 40, 2), 2, "aot_eager")
    assert results["fused"]["wrong"].startswith("dmodulation: RMS error")
    assert "median_s" in results["eager"]["forward"]


def test_a_wrong_compiler_is_not_timed():
    def compiler(graph, _inputs):
        return lambda *args: tuple(1.01 * output for output in graph(*args))

    results = compare(bench_ada_norm.OP, (32, 40, 2), 2, compiler)
    assert "RMS error" in results["torch.compile"]["wrong"]
    assert "wrong" not in results["fused"]
    assert bench_block.ratio(results, "torch.compile", "fused") is None


def suite(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_dry_run_of_the_gpu_suite(tmp_path):
    done = suite("--dry-run", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results.keys() == gpu_suite.LIMITS.keys()
    assert all(result["status"] == "ok" for result in results.values())
    assert results["accuracy"]["kernels/test_ada_norm"] == {"passed": 1, "failed": []}
    assert results["foga"]["block_forwards"] == 3 * 4 // 2
    assert results["foga"]["stacked max score difference"] < 1e-5
    for operation in (*results["ops"].values(), *results["alignment"].values()):
        if isinstance(operation, dict) and "fused" in operation:
            assert "wrong" not in operation["fused"]


def test_without_a_gpu_the_suite_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = suite()
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no GPU" in done.stdout


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(monkeypatch):
    monkeypatch.setenv("AGREPA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # so nothing can run it here
    ran = gpu_suite.run_parts(["ceilings", "foga", "sdpa"], True, 100)
    assert [part["status"].partition(",")[0] for part in ran.values()] == ["ok", "failed", "ok"]
    assert "Error" in ran["foga"]["log"][-1]
    assert gpu_suite.run_parts(["ceilings"], True, 0.1)["ceilings"]["status"] == "stopped after 0 s"
