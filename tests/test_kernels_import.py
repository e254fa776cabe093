import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("name", ["tritn", "triton"])
def test_unknown_backend_is_refused(monkeypatch, name):
    from agrepa_fast.kernels import active_backend

    monkeypatch.setenv("AGREPA_BACKEND", name)
    with pytest.raises(ValueError, match="this version has reference"):
        active_backend()
