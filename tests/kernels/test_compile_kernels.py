"""The Triton kernels, compiled for sm_90 at d = 1024 without a GPU, keep their limits, and a broken limit is an error.

All runs share one process of their own: this one interprets kernels, and Triton cannot compile in a process that does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPERATIONS = {
    "ada_norm",
    "align_loss",
    "flow_mix",
    "gated_residual",
    "linear_gelu",
    "qk_norm_rope",
    "velocity_change",
}
PROGRAM = """
import contextlib, io, json, sys
import compile_kernels

def run(name, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = compile_kernels.main(["--archs", "90", "--dims", "1024", "--out", sys.argv[1], *arguments])
    with open(sys.argv[1]) as file:
        results[name] = code, printed.getvalue(), json.load(file)

results = {}
run("as it is")

def misaligned(width):
    scale, shift, *_ = compile_kernels.modulations(width)
    compile_kernels.ada_norm(compile_kernels.leaf(16, 938, width + 1)[..., 1:], scale, shift)

original = compile_kernels.CASES["ada_norm"]
compile_kernels.CASES["ada_norm"] = misaligned
run("misaligned view", "--ops", "ada_norm")
compile_kernels.CASES["ada_norm"] = abs
run("nothing launched", "--ops", "ada_norm")
compile_kernels.CASES["ada_norm"] = original
module = sys.modules["agrepa_fast.kernels.ada_norm"]
tile = module.row_tile
module.row_tile = lambda *sizes: tile(*sizes) | {"num_warps": 1}  # 4096 elements of four tensors on 32 threads
run("spills", "--ops", "ada_norm")
print(json.dumps(results))
"""


class Run(NamedTuple):
    exit_code: int
    printed: str
    summary: dict


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("compiled") / "out.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Run(*values) for name, values in json.loads(done.stdout).items()}


def test_every_kernel_keeps_its_limits(runs):
    run = runs["as it is"]
    assert run.exit_code == 0, run.printed
    assert run.summary["sm_90"].keys() == OPERATIONS
    for operation, costs in run.summary["sm_90"].items():
        assert costs["spills"] == 0, operation
        assert costs["main_load_bits"]["1024"] >= 128, operation


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("misaligned view", "a main load of 16 bits, wanted 128"),
        ("spills", "spills, allowed 0"),
        ("nothing launched", "no kernel was launched"),
    ],
)
def test_a_broken_limit_is_an_error(broken, message, runs):
    assert runs[broken].exit_code == 1
    assert message in runs[broken].printed
    assert runs[broken].summary["broken_limits"] > 0
