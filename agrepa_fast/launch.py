"""The place of this process among those that a launcher has started: its rank, theirs, and its device.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun and mpirun set variables of
their own, from which the first three are derived. A process without any of them trains alone.
"""

import os
import re
import socket
import sys
import time
from dataclasses import dataclass

import torch

from .errors import UserError

_LAUNCHERS = {  # its variables for the rank, the number of ranks, and the rank among those on the same machine
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # all three: inside a step, not a batch script
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # and Intel MPI
    "MVAPICH2": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
}
_NUMBER = re.compile("[0-9]{1,9}")
_REMEDY = "start the ranks with deepspeed or torchrun, or export it for each of them"


@dataclass(frozen=True)
class _Place:
    """The place of this process, as srun or mpirun states it."""

    rank: int
    world: int
    local_rank: int


def complete_launch_environment() -> int:
    """Set those of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT that are missing, and return the number of
    ranks. Call it before a process group is joined. Raises UserError naming the variable that is wrong, or that cannot
    be derived."""
    place = _place_by_launcher()
    on_its_own = "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1"
    if on_its_own and (place is None or place.world == 1):
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        return 1
    rank = _number("RANK", place and place.rank)
    world = _number("WORLD_SIZE", place and place.world)
    if rank >= world:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world}: ranks are numbered from 0 to WORLD_SIZE - 1")
    if world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", free_port())
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name} is not set, and {world} ranks find each other by it: export MASTER_ADDR=<the machine of rank "
                "0> and MASTER_PORT=29500 for all ranks, or start them with deepspeed or torchrun"
            )
    if not 0 < _number("MASTER_PORT", None) < 2**16:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: a port from 1 to 65535 is wanted")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = str(_number("LOCAL_RANK", _local_rank(rank, world, place)))
    return world


def launched_rank() -> int:
    """Return the rank of this process before it has joined the others: the one in the launcher's variables, 0 if they
    say nothing. Call it to print a line once."""
    place, rank = _place_by_launcher(), os.environ.get("RANK", "")
    known = place is not None or "WORLD_SIZE" in os.environ  # RANK alone may be left over from a pod or a script
    return int(rank) if known and _NUMBER.fullmatch(rank) else place.rank if place is not None else 0


def check_master_address(patience: float = 60.0) -> None:
    """Wait until MASTER_ADDR has an address; torch would try for as long as ranks wait for each other. Raises
    UserError after `patience` seconds, in which a cluster may still be making its names known."""
    name, until = os.environ["MASTER_ADDR"], time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until:
                raise UserError(f"MASTER_ADDR={name}: no address is known for it ({error}): correct it") from error
        time.sleep(1)


def why_not_joined(error: Exception) -> str:
    """Return one line about ranks that could not join each other. error: torch.distributed's."""
    text, port = " ".join(str(error).split()), os.environ["MASTER_PORT"]
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return (
            f"port {port} of this machine is in use, by another run for one: give this run a port of its own, as in "
            "deepspeed --master_port 29501 or torchrun --master_port 29501; without a launcher, in MASTER_PORT"
        )
    return (
        f"the {os.environ['WORLD_SIZE']} ranks did not find each other at {os.environ['MASTER_ADDR']}:{port} "
        f"({text[:200]}): start all of them, with the same MASTER_ADDR and MASTER_PORT"
    )


def local_device() -> torch.device:
    """Return the device of this rank: the GPU that LOCAL_RANK numbers, or the CPU. Raises UserError if there is no
    such GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows every rank its own GPU and no other
    if number >= gpus:
        raise UserError(f"LOCAL_RANK={number}, but this process sees {gpus} GPUs: start one rank per GPU")
    return torch.device("cuda", number)


def number_gpu(device: torch.device) -> None:
    """Let LOCAL_RANK be the number of this rank's GPU, for which DeepSpeed takes it. It is another one where a rank
    sees its own GPU alone."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed wants them to be the same
        if name in os.environ:
            os.environ[name] = str(device.index)


def _place_by_launcher() -> _Place | None:
    for names in _LAUNCHERS.values():
        values = [os.environ.get(name, "") for name in names]
        if all(_NUMBER.fullmatch(value) for value in values):
            return _Place(*map(int, values))
    return None


def _number(name: str, derived: int | None) -> int:
    """The variable's value, or else the one derived from the launcher's. Raises UserError if there is neither."""
    text = os.environ.get(name)
    if text is None:
        if derived is None:
            raise UserError(f"{name} is not set, and no variable of srun or mpirun tells it: {_REMEDY}")
        return derived
    if not _NUMBER.fullmatch(text):
        raise UserError(f"{name}={text}: a number from 0 on is wanted")
    return int(text)


def _local_rank(rank: int, world: int, place: _Place | None) -> int | None:
    """The rank among those on the same machine; None if nothing tells it."""
    if place is not None and (place.rank, place.world) == (rank, world):
        return place.local_rank
    if world == 1:
        return 0
    on_this_machine = os.environ["MASTER_ADDR"] in ("127.0.0.1", "::1", "localhost")
    return rank if on_this_machine else None


def free_port() -> str:
    """Return a port of this machine that nothing uses at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def end_process(code: int) -> None:
    """End this process at once, without Python's finalization and the functions registered with atexit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
