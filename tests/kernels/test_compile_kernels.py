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
    "frame_loss",
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
tiles = sys.modules["agrepa_fast.kernels._launch"]
tiles.TILES["ada_norm_fwd"] = tiles.Tile(8, 1)  # 8192 elements of four tensors on 32 threads
run("spills", "--ops", "ada_norm")
tiles.TILES["ada_norm_bwd"] = tiles.Tile(2, 8)
run("too few programs", "--ops", "ada_norm")

def kernels(clips, frames):
    compile_kernels.N, compile_kernels.T = clips, frames
    with compile_kernels.recording(90) as launched, compile_kernels.force_backend("triton"):
        with compile_kernels.WithoutProducts():
            for operation in ("ada_norm", "gated_residual", "qk_norm_rope", "linear_gelu", "align_loss", "frame_loss"):
                compile_kernels.CASES[operation](1024)
    return sorted(launched)

results["kernels"] = [kernels(*sizes) for sizes in ((16, 938), (16, 960), (3, 37), (1, 1))]
print(json.dumps(results))
"""


class Run(NamedTuple):
    exit_code: int
    printed: str
    summary: dict


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run | list]:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("compiled") / "out.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return {name: values if name == "kernels" else Run(*values) for name, values in results.items()}


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
        ("too few programs", "programs per SM, wanted"),
        ("too few programs", "barriers, allowed"),
    ],
)
def test_a_broken_limit_is_an_error(broken, message, runs):
    assert runs[broken].exit_code == 1
    assert message in runs[broken].printed
    assert runs[broken].summary["broken_limits"] > 0


def test_one_kernel_serves_every_batch_and_length(runs):
    """A batch of a new kind, such as one clip or a length that 16 divides, must not compile in the middle of a run."""
    assert len(runs["kernels"][0]) > 20
    for others in runs["kernels"][1:]:
        assert others == runs["kernels"][0]
