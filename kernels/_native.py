"""The CPU library of csrc/cpu, called through ctypes: plain C functions, so one build serves every torch version."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

DTYPES = (torch.float32, torch.bfloat16)
_C_TYPES = {bool: ctypes.c_int64, int: ctypes.c_int64, float: ctypes.c_float}  # others are pointers
ISAS = ("generic", "avx2", "avx512")  # in the order of agrepa_isa's numbers


def _load() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("_cpu.so")
    if not path.is_file():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # this torch brought no OpenMP symbols into the process: use the system's
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))


LIBRARY = _load()
_isa: str | None = ISAS[LIBRARY.agrepa_isa()] if LIBRARY else None


def native_isa() -> str | None:
    """Return the instruction set in use (generic, avx2 or avx512), or None if the library was not built."""
    return _isa


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Inside it, all threads run the functions of this instruction set, so that tests can compare narrower ones.

    Raises ValueError if the machine or the library lacks it.
    """
    global _isa
    if LIBRARY is None or name not in ISAS[: LIBRARY.agrepa_isa() + 1]:
        raise ValueError(f"{name!r} does not run here: {_isa or 'the CPU library was not built'}")
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


@cache
def _function(operation: str, dtype: torch.dtype, isa: str) -> ctypes._CFuncPtr:
    symbol = f"agrepa_{operation}_{str(dtype).removeprefix('torch.')}_{isa}"
    return ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(LIBRARY, symbol).value)


def call(operation: str, dtype: torch.dtype, *arguments: torch.Tensor | int | float | None) -> None:
    """Run a function of csrc/cpu for elements of `dtype`, with the arguments in its order.

    Tensors become pointers (None a null pointer), bools and ints int64, and floats fp32.
    """
    function = _function(operation, dtype, _isa)
    if not function.argtypes:
        function.argtypes = [_C_TYPES.get(type(value), ctypes.c_void_p) for value in arguments]
    function(*[value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments])
