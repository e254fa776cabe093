import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def test_defines_nothing_under_another_name():
    """transformers and diffusers import whatever is called `kernels`; with the checkout on sys.path that is ours."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kernels
print([name for name in vars(kernels) if not name.startswith("_")])
"""
    done = python(code, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_import_needs_torch_alone():
    """`import agrepa_fast` must not pull in what only some commands need (torch itself imports tqdm where it is)."""
    heavy = [
        "omegaconf",
        "deepspeed",
        "transformers",
        "webdataset",
        "torchaudio",
        "matplotlib",
        "soundfile",
        "scipy",
        "yaml",
    ]
    done = python(f"import sys, agrepa_fast; print([m for m in {heavy} if m in sys.modules])", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


BACKEND = "from agrepa_fast.kernels import active_backend; print(active_backend({device!r}))"


@pytest.mark.parametrize(
    ("environment", "device", "answer"),
    [
        ({}, "cpu", "native"),
        ({}, "cuda", "triton"),
        ({"AGREPA_BACKEND": "reference"}, "cuda", "reference"),
        ({"AGREPA_BACKEND": "triton", "TRITON_INTERPRET": "1"}, "cpu", "triton"),
        ({"AGREPA_BACKEND": "tritn"}, "cpu", "choose one of triton, native, reference"),
        ({"AGREPA_BACKEND": "triton"}, "cpu", "set TRITON_INTERPRET=1 too"),
        ({"AGREPA_BACKEND": "native"}, "cuda", "the CPU library runs on CPUs only"),
    ],
)
def test_backend_decision(environment, device, answer):
    """AGREPA_BACKEND is read at import: each case is a process."""
    clean = {name: value for name, value in os.environ.items() if name not in ("AGREPA_BACKEND", "TRITON_INTERPRET")}
    done = python(BACKEND.format(device=device), cwd=ROOT, env=clean | environment)
    assert answer in (done.stdout if done.returncode == 0 else done.stderr.splitlines()[-1])


def test_without_triton_and_without_the_library():
    """No compiler at install and no Triton: the references run on a CPU; on CUDA a missing Triton is an error."""
    code = """
import sys
sys.modules["triton"] = None
from pathlib import Path
import torch
exists = Path.is_file
Path.is_file = lambda path: path.name != "_cpu.so" and exists(path)
from agrepa_fast.kernels import active_backend, ada_norm, native_isa
assert native_isa() is None
print(active_backend("cpu"), ada_norm(torch.ones(2, 3, 4), torch.zeros(2, 4), torch.ones(2, 4)).sum().item())
active_backend("cuda")
"""
    done = python(code, cwd=ROOT, env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})
    assert done.stdout.split() == ["reference", "24.0"], done.stderr
    assert "needs triton >= 3.6" in done.stderr
