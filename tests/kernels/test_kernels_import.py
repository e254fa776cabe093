import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import agrepa_fast
from agrepa_fast.kernels import active_backend, force_backend

ROOT = Path(__file__).parents[2]


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def test_defines_nothing_under_another_name():
    """transformers and diffusers import any `kernels`; with the checkout on sys.path it is ours."""
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
    """`import agrepa_fast` must not import packages that only some commands need (torch itself imports tqdm)."""
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
        "pydantic",
        "triton",
    ]
    done = python(f"import sys, agrepa_fast; print([m for m in {heavy} if m in sys.modules])", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names_are_imported_on_first_use():
    """And are found by `import *`, dir() and type checkers, which read the imports below TYPE_CHECKING."""
    code = """
import agrepa_fast
assert {*agrepa_fast.__all__} <= {*dir(agrepa_fast)}
assert "agrepa_fast.models" not in __import__("sys").modules
from agrepa_fast import *
for name in agrepa_fast.__all__:
    assert globals()[name] is getattr(agrepa_fast, name), name
assert GatedDiTBlock.__module__ == "agrepa_fast.models.audio_dit.block"
try:
    agrepa_fast.GatedDitBlock
except AttributeError as error:
    print(error)
"""
    done = python(code, cwd=ROOT)
    assert done.stdout.strip() == "module 'agrepa_fast' has no attribute 'GatedDitBlock'", done.stderr
    tree = ast.parse((ROOT / "agrepa_fast" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert {line.names[0].name: line.module for line in checked.body} == agrepa_fast._HOMES


@pytest.mark.parametrize(
    ("forced", "interpret", "device", "answer"),
    [
        (None, "0", "cpu", "native"),
        (None, "0", "cuda", "triton"),
        ("reference", "0", "cuda", "reference"),
        ("triton", "1", "cpu", "triton"),
    ],
)
def test_backend_decision(forced, interpret, device, answer, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with force_backend(forced):
        assert active_backend(device) == answer


@pytest.mark.parametrize(
    ("forced", "device", "message"),
    [
        ("tritn", "cpu", "choose one of triton, native, reference"),
        ("triton", "cpu", "set TRITON_INTERPRET=1 too"),
        ("native", "cuda", "the CPU library runs on CPUs only"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(forced, device, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with force_backend(forced), pytest.raises(ValueError, match=message):
        active_backend(device)


def test_the_environment_forces_a_backend():
    code = "from agrepa_fast.kernels import active_backend; print(active_backend('cuda'))"
    done = python(code, cwd=ROOT, env=os.environ | {"AGREPA_BACKEND": "reference"})
    assert done.stdout.strip() == "reference", done.stderr


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
