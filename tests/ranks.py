"""Functions and training runs on ranks: forked from a server that has imported everything, or in new processes.

Importing torch and DeepSpeed takes seconds, forking a process that has done so takes 20 ms. Forked ranks share nothing
with the tests or with each other: DeepSpeed's globals, signal handlers, random states and locks end with the process.
"""

import functools
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that a rank may take
# Runs of tests are on the CPU, in fp32, also where there are GPUs: there may be fewer than ranks.
_SHARED = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


_ports = itertools.count()
_reserved: deque[socket.socket] = deque(maxlen=64)  # more than a worker has groups at a time


@dataclass
class Ended:
    """A rank that has ended: its exit code, all it printed, and the value that the function returned, if it did."""

    code: int
    output: str
    value: object


def free_port() -> str:
    """A port below those that the system gives to connections, and of this worker alone: nothing takes it before its
    use. It stays reserved against the other test runs on this machine, which count through the same ports."""
    first = 10_000 + 2_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8)
    while True:
        port = first + (os.getpid() + next(_ports)) % 2_000
        probe = socket.socket()
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            probe.close()
            continue
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the ranks' store may listen beside it
        _reserved.append(probe)
        return str(port)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """The variables that a launcher sets, for every rank of a new group on this machine."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= _SHARED
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@functools.cache
def _fork_server() -> multiprocessing.context.ForkServerContext:
    """The context of this process's server, started on first use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with mock.patch.dict(os.environ, _SHARED):
        multiprocessing.forkserver.ensure_running()
    return context


def fork_ranks(ranks: int, function: Callable, *arguments: object, cwd: Path | None = None) -> list[Ended]:
    """Run `function(*arguments)` in a forked process per rank and wait for all of them. The function is a module's,
    its arguments and result can be pickled. A rank that takes too long is killed and its exit code is -9."""
    with tempfile.TemporaryDirectory() as kept:
        folders = [Path(kept, str(rank)) for rank in range(ranks)]
        processes = []
        for folder, environment in zip(folders, rank_environments(ranks), strict=True):
            folder.mkdir()
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # not what an earlier version of an op was compiled to
            given = (function, arguments, folder, environment, cwd or folder)
            processes.append(_fork_server().Process(target=_run_rank, args=given))
        until = time.monotonic() + SECONDS
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        ended = []
        for folder, process in zip(folders, processes, strict=True):
            value = folder / "value"
            result = pickle.loads(value.read_bytes()) if value.exists() else None
            ended.append(Ended(process.exitcode, (folder / "output").read_text(errors="replace"), result))
        return ended


def _run_rank(function: Callable, arguments: tuple, folder: Path, environment: dict[str, str], cwd: Path) -> None:
    """The body of a forked process."""
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(cwd)
    value = pickle.dumps(function(*arguments))
    (folder / "value").write_bytes(value)


def call_on_ranks(ranks: int, function: Callable, *arguments: object) -> list:
    """The results of `function(*arguments)` on every rank, called inside a process group."""
    ended = fork_ranks(ranks, _inside_a_group, function, arguments)
    assert not any(rank.code for rank in ended), endings(ended)
    return [rank.value for rank in ended]


def _inside_a_group(function: Callable, arguments: tuple) -> object:
    import torch.distributed as dist

    from agrepa_fast.zero.process_group import join_process_group

    join_process_group()
    value = function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    return value


def train(ranks: int, *arguments: str, cwd: Path, plant: Callable[[], object] | None = None) -> list[Ended]:
    """Run train.py in forked processes. Plots are empty files and sounds are silence: a new process (`start_training`)
    makes them. plant: called on every rank before it trains."""
    return fork_ranks(ranks, _train, [*arguments], plant, cwd=cwd)


def run_training(ranks: int, *arguments: str, cwd: Path, wanted: int = 0, plant: Callable | None = None) -> str:
    """Train as `train` does, check every rank's exit code, return rank 0's output."""
    ended = train(ranks, *arguments, cwd=cwd, plant=plant)
    assert all(rank.code == wanted for rank in ended), endings(ended)
    return ended[0].output


def endings(ended: list[Ended]) -> str:
    """The exit code and the output of every rank: one that fails may only miss another, and one that was killed prints
    nothing."""
    return "\n".join(f"rank {n} ended with {rank.code}\n{rank.output[-4000:]}" for n, rank in enumerate(ended))


def _train(arguments: list[str], plant: Callable | None) -> None:
    from agrepa_fast import train

    leave_out_pictures(setattr)
    if plant is not None:
        plant()
    train.run_process(arguments)


def leave_out_pictures(set_attribute: Callable[[object, str, object], None]) -> None:
    """Make plots empty files and let Griffin-Lim return silence: most of a small run's time goes into them.
    set_attribute: monkeypatch's, or the built-in one for the rest of the process."""
    import torch
    from matplotlib.figure import Figure

    from agrepa_fast.audio.waves import import_torchaudio

    def silence(magnitude: torch.Tensor, window, n_fft: int, hop_length: int, *_, **__) -> torch.Tensor:
        return magnitude.new_zeros(len(magnitude), hop_length * (magnitude.shape[-1] - 1))

    set_attribute(Figure, "savefig", lambda self, path, **_: Path(path).touch())
    set_attribute(import_torchaudio().functional, "griffinlim", silence)


def start_training(ranks: int, *arguments: str, cwd: Path) -> list[subprocess.Popen]:
    """The ranks of one run in new processes, for tests that send them signals or end them."""
    return start_ranks(ranks, ROOT / "agrepa_fast" / "train.py", *arguments, cwd=cwd)


def start_ranks(ranks: int, script: Path, *arguments: str, cwd: Path) -> list[subprocess.Popen]:
    """Start a script in a new process per rank, as a launcher does, but seconds sooner."""
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=os.environ | environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in rank_environments(ranks)
    ]


def run_ranks(ranks: int, script: Path, *arguments: str) -> list[str]:
    """Run a script in new processes, check the exit codes, return what each rank printed."""
    processes = start_ranks(ranks, script, *arguments, cwd=script.parent)
    outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs
