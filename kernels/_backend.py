"""Choose the backend of the operations; nothing else does.

Triton on CUDA, native (csrc/cpu) on CPUs, and reference on CPUs without that library. AGREPA_BACKEND, read once at
import, forces one. float64 runs the reference everywhere, and float16 on CPUs: the kernels compute in fp32, and the CPU
library has fp32 and bf16 only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from . import _native

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # CPU users need no Triton: kernels are defined all the same, and never launched
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda function: function))
    tl = SimpleNamespace(constexpr=object)

if hasattr(triton, "__version__") and os.environ.get("TRITON_INTERPRET") == "1":
    from . import _interpreter

    _interpreter.patch()

BACKENDS = ("triton", "native", "reference")
# Of the process, not of a thread: autograd runs backwards in threads of its own.
_forced: str | None = os.environ.get("AGREPA_BACKEND") or None


def active_backend(device: torch.device | str | None = None) -> str:
    """Return the backend of a device (default: the GPU if there is one).

    Raises ValueError if the forced backend is unknown or cannot run there, and RuntimeError on CUDA without Triton.
    """
    on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    name = _forced or _best(on_cuda)
    if name not in BACKENDS:
        raise ValueError(f"AGREPA_BACKEND={name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "triton" and not hasattr(triton, "__version__"):
        raise RuntimeError("the Triton backend needs triton >= 3.6: pip install triton (or AGREPA_BACKEND=reference)")
    if name == "triton" and not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("AGREPA_BACKEND=triton without a GPU: set TRITON_INTERPRET=1 too (slow, for tests)")
    if name == "native" and (on_cuda or _native.LIBRARY is None):
        why = "runs on CPUs only" if on_cuda else "was not built: install a C++ compiler, then pip install -e . again"
        raise ValueError(f"AGREPA_BACKEND=native: the CPU library {why}")
    return name


def _best(on_cuda: bool) -> str:
    if on_cuda:
        return "triton"
    return "reference" if _native.LIBRARY is None else "native"


def backend_of(x: torch.Tensor) -> str:
    """Return the backend that computes an operation on x. Never raises: a missing backend fails at its launch."""
    name = _forced or _best(x.is_cuda)
    if x.dtype == torch.float64 or (name == "native" and x.dtype not in _native.DTYPES):
        return "reference"
    return name


@contextmanager
def force_backend(name: str | None) -> Iterator[None]:
    """Inside it, this backend runs in all threads; None chooses as usual. A backward must run inside it as well.

    Tests and benchmarks compare backends by it."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
