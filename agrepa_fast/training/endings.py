"""How a run ends that nobody asked to end: one process a folder, a bound on waiting for a rank that is gone, and a line
that says what happened."""

import errno
import fcntl
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from ..errors import UserError

_claimed: list[TextIO] = []  # open as long as the process lives


def claim(folder: Path) -> None:
    """Make this process the only one that trains in `folder`, until it ends. UserError when another one does: a run
    whose launcher was killed goes on, and two of them would overwrite each other's checkpoints."""
    path = folder / ".lock"
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, loader processes do not inherit it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            return
        raise UserError(
            f"run.dir={folder} is in use by {path.read_text().strip() or 'another process'}: end it first, or choose "
            "another folder"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _claimed.append(file)


def limit_waiting(minutes: float) -> None:
    """From here on, a collective that some rank does not come to fails after so many minutes, in every group."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in _world.pg_map:
        _set_pg_timeout(timedelta(minutes=minutes), group)


def explain(error: Exception) -> str:
    """One line for an error that is nobody's input: which process is gone, where the error says so."""
    text = " ".join(str(error).split())
    if text.startswith("DataLoader worker"):
        return (
            f"a loader process ended ({text}): memory that ran out is the usual reason, lower data.workers; "
            "--resume latest goes on from the last checkpoint"
        )
    if "gloo" in text or isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return (
            "another rank ended, or does not answer; its own output says why. --resume latest goes on from the last "
            "checkpoint"
        )
    return f"{type(error).__name__}: {text[:300]}"
