"""The Triton kernels, compiled for sm_90 at d = 1024 without a GPU, keep their limits; and the check itself bites.

In processes of their own: this one may interpret kernels, and whoever interprets cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPERATIONS = {
    "ada_norm", "align_loss", "flow_mix", "gated_residual", "linear_gelu", "qk_norm_rope", "velocity_change",
}  # fmt: skip


def compile_kernels(path, before: str = "", *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Run the script for sm_90 at d = 1024 after the statements `before`; returns it and what it wrote."""
    program = f"import sys\nimport compile_kernels\n{before}\nsys.exit(compile_kernels.main())"
    command = [sys.executable, "-c", program, "--archs", "90", "--dims", "1024", "--out", str(path), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert path.exists(), done.stderr
    return done, json.loads(path.read_text())["kernels"]


def test_every_kernel_keeps_its_limits(tmp_path):
    done, kernels = compile_kernels(tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {kernel["operation"] for kernel in kernels} == OPERATIONS
    assert {kernel["arch"] for kernel in kernels} == {90}
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["main_load_bits"] in (None, 128, 256), kernel


def test_a_misaligned_view_is_refused(tmp_path):
    before = """
def misaligned(width):
    scale, shift, *_ = compile_kernels.modulations(width)
    compile_kernels.ada_norm(compile_kernels.leaf(16, 938, width + 1)[..., 1:], scale, shift)
compile_kernels.CASES["ada_norm"] = misaligned
"""
    done, kernels = compile_kernels(tmp_path / "out.json", before, "--ops", "ada_norm")
    assert done.returncode == 1
    assert "a main load of 16 bits, wanted 128" in kernels[0]["broken"]


def test_spills_are_refused(tmp_path):
    before = """
module = sys.modules["agrepa_fast.kernels.ada_norm"]
tile = module.row_tile
module.row_tile = lambda *sizes: tile(*sizes) | {"num_warps": 1}  # 4096 elements of four tensors on 32 threads
"""
    done, kernels = compile_kernels(tmp_path / "out.json", before, "--ops", "ada_norm")
    assert done.returncode == 1
    assert any("spills, allowed 0" in broken for kernel in kernels for broken in kernel["broken"])


def test_an_operation_that_launches_nothing_is_refused(tmp_path):
    done, kernels = compile_kernels(
        tmp_path / "out.json", "compile_kernels.CASES['ada_norm'] = abs", "--ops", "ada_norm"
    )
    assert done.returncode == 1
    assert "no kernel was launched" in done.stdout
    assert kernels == []
