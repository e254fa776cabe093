"""The process group of a run: joined through DeepSpeed, and how long its ranks wait for each other."""

import logging
from datetime import timedelta

import torch

from ..errors import UserError
from ..kernels import active_backend
from ..launch import check_master_address, complete_launch_environment, local_device, number_gpu, why_not_joined

START = timedelta(minutes=15)  # ranks wait for the last of them to be started, and then until train.patience is known


def join_process_group() -> torch.device:
    """Join the group of the ranks that a launcher has started, or one of this process alone, and return this rank's
    device. A process that has joined stays as it is. Raises UserError for a launch that is incomplete, a port in use
    and ranks that do not come."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    complete_launch_environment()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        number_gpu(device)
    else:
        _without_shared_memory_op()
    check_master_address()
    try:
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", timeout=START, verbose=False)
    except (RuntimeError, ValueError) as error:
        raise UserError(why_not_joined(error)) from error
    return device


def check_backend() -> None:
    """Raise UserError for an AGREPA_BACKEND that is unknown or cannot run here."""
    try:
        active_backend()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def set_collective_timeout(minutes: float) -> None:
    """From here on, a collective that some rank does not join fails after so many minutes, in every group."""
    # torch has no public way to change the time-out of a group that exists.
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    timeout = timedelta(minutes=minutes)
    for group, (_, store) in _world.pg_map.items():
        _set_pg_timeout(timeout, group)
        store.set_timeout(timeout)  # communicators of NCCL are made at their first collective, through the store


def _without_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU: a minute on first use, and killed meanwhile
    it leaves a lock on which every later run hangs. Losses are the same without them."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
