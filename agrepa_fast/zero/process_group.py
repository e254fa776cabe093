"""The process group of a run: joined through DeepSpeed, and how long its ranks wait for each other."""

import logging
from datetime import timedelta

import torch

from ..errors import UserError
from ..kernels import active_backend
from ..launch import complete_launch_environment, local_device
from ..ranks import PATIENCE


def join_process_group() -> torch.device:
    """Join the group of the ranks that a launcher has started, or one of this process alone, and return this rank's
    device. Raises UserError for an AGREPA_BACKEND that is unknown or cannot run here, and for an incomplete launch."""
    import deepspeed

    try:
        active_backend()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    complete_launch_environment()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _without_shared_memory_op()
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, verbose=False)
    return device


def set_collective_timeout(minutes: float) -> None:
    """From here on, a collective that some rank does not join fails after so many minutes, in every group."""
    # torch has no public way to change the time-out of a group that exists, and init_distributed's must be long.
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in _world.pg_map:
        _set_pg_timeout(timedelta(minutes=minutes), group)


def _without_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU: a minute on first use, and killed meanwhile
    it leaves a lock on which every later run hangs. Losses are the same without them."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
