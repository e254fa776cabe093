"""Mute what C libraries print on stderr, without touching Python's."""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0  # threads
_files: tuple[ctypes.c_void_p, int, int] | None = None  # libc's variable, its value, and /dev/null


@contextmanager
def muted() -> Iterator[None]:
    """Mute the `stderr` of libc's stdio while any thread is inside. Python, its tracebacks and progress bars write to
    the descriptor itself, and are not muted; neither is glibc when it ends the process."""
    global _inside, _files
    if platform.libc_ver()[0] != "glibc":  # elsewhere the variable has another name, or cannot be written
        yield
        return
    with _lock:
        if _files is None:
            libc = ctypes.CDLL(None)
            libc.fopen.restype = ctypes.c_void_p
            variable = ctypes.c_void_p.in_dll(libc, "stderr")
            _files = variable, variable.value, libc.fopen(b"/dev/null", b"w")
        variable, stderr, null = _files
        _inside += 1
        variable.value = null
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                variable.value = stderr
