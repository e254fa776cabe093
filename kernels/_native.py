"""The CPU library of csrc/cpu, called through ctypes: plain C functions, so one build serves every torch version."""

import ctypes
from pathlib import Path

import torch

DTYPES = (torch.float32, torch.bfloat16)
ISAS = ("generic", "avx2", "avx512")  # agrepa_isa() returns the place of the machine's own


def _load() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("_cpu.so")
    if not path.is_file():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # a torch that brought no OpenMP symbols into the process: take the system's
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))


LIBRARY = _load()
isa = ISAS[LIBRARY.agrepa_isa()] if LIBRARY else None  # tests set it to run the others


def native_isa() -> str | None:
    """The instruction set whose functions run (generic, avx2 or avx512), or None where the library was not built."""
    return isa


_functions: dict[tuple[str, torch.dtype, str], ctypes._CFuncPtr] = {}


def call(operation: str, dtype: torch.dtype, *arguments: torch.Tensor | int | float | None) -> None:
    """Run a function of csrc/cpu for element type `dtype`. Tensors go as pointers (None as a null pointer), bools and
    ints as int64, floats as fp32; the order is that of the C function."""
    key = (operation, dtype, isa)
    if key not in _functions:
        symbol = f"agrepa_{operation}_{str(dtype).removeprefix('torch.')}_{isa}"
        _functions[key] = ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(LIBRARY, symbol).value)
    _functions[key](*map(_as_c, arguments))


def _as_c(value: torch.Tensor | int | float | None):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p()
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
