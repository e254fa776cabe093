"""Mute the output of C libraries on stderr, without touching Python's."""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_lock = threading.Lock()
_inside = 0  # threads


@contextmanager
def muted() -> Iterator[None]:
    """Mute the `stderr` of libc's stdio while any thread is inside. Python, its tracebacks and progress bars write to
    the descriptor itself, and are not muted; neither is glibc when it ends the process."""
    global _inside
    with _lock:
        files = _files()
        _inside += 1
        if files:
            variable, stderr, null = files
            variable.value = null
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if files and _inside == 0:
                variable.value = stderr


@cache
def _files() -> tuple[ctypes.c_void_p, int, int] | None:
    """Return libc's variable, the file that it names, and /dev/null. Returns None without glibc: elsewhere the variable
    has another name, or cannot be written."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    variable = ctypes.c_void_p.in_dll(libc, "stderr")
    return variable, variable.value, libc.fopen(b"/dev/null", b"w")
