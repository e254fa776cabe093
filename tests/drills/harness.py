"""The ranks of a run as processes that are watched, frozen and killed. What faults.py and soak.py share."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from _bench import ROOT

from tests.testing import free_port

BOUND = 60.0  # seconds after which a process that should have ended is said to hang
_LOADER = "pt_data_worker"  # PyTorch's name for a DataLoader's processes


@dataclass
class Job:
    """The processes of one run: its ranks, or a launcher with the ranks below it."""

    started: list[subprocess.Popen]
    logs: list[Path]
    launched: bool

    def ranks(self) -> list[int]:
        """Process ids in the order of ranks; of a launcher's ranks those that there are already."""
        if not self.launched:
            return [process.pid for process in self.started]
        found = {}
        for process in _descendants(self.started[0].pid):
            with suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and process.name() != _LOADER and "RANK" not in process.parent().environ():
                    found[int(rank)] = process.pid
        return [found[rank] for rank in sorted(found)]

    def loaders(self, rank: int) -> list[int]:
        """Process ids of a rank's loader processes."""
        return [process.pid for process in _descendants(self.ranks()[rank]) if _name(process) == _LOADER]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.started)

    def until(self, condition: Callable[[], object], seconds: float = 180.0) -> None:
        """Look every millisecond. RuntimeError, with the outputs, when a process ends before or the time is over."""
        over = time.monotonic() + seconds
        while not condition():
            if not self.alive() or time.monotonic() > over:
                raise RuntimeError("what was waited for did not come:\n" + "\n".join(self.outputs()))
            time.sleep(0.001)

    def end(self, seconds: float = BOUND) -> list[int | None]:
        """Exit codes of what was started; None where a process was still there after `seconds`. What is left then is
        the caller's to kill."""
        over = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self.started:
            try:
                codes.append(process.wait(max(0.0, over - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        return codes

    def left(self) -> list[int]:
        """Process ids of what still runs in the sessions of what was started: each was started in one of its own."""
        leaders = {process.pid for process in self.started}
        return [p.pid for p in psutil.process_iter() if _session(p) in leaders and _name(p) is not None]

    def wait_until_left(self, seconds: float) -> bool:
        """Whether everything has ended by itself within so many seconds."""
        over = time.monotonic() + seconds
        while self.left():
            if time.monotonic() > over:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """SIGKILL to everything that is left."""
        kill(self.left())
        for process in self.started:
            process.wait()

    def outputs(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]


def start(ranks: int, *arguments: str, cwd: Path, launched: bool = False, logs: Path | None = None) -> Job:
    """A run of agrepa_fast/train.py in `cwd`; its ranks are started directly, or by the deepspeed launcher. `logs`: the
    folder for their outputs (default: cwd)."""
    script = str(ROOT / "agrepa_fast" / "train.py")
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    port = free_port()
    if launched:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        commands = [[launcher, "--num_gpus", str(ranks), "--master_port", port, script, *arguments]]
        environments = [shared]
    else:
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands = [[sys.executable, script, *arguments]] * ranks
        environments = [shared | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    folder, written, started = logs or cwd, [], []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (command, environment) in enumerate(zip(commands, environments, strict=True)):
        written.append(folder / (f"launcher-{port}.log" if launched else f"rank{number}-{port}.log"))
        with written[-1].open("w") as log:
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return Job(started, written, launched)


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _name(process: psutil.Process) -> str | None:
    """Its name; None for one that has ended."""
    with suppress(psutil.Error):
        return None if process.status() == psutil.STATUS_ZOMBIE else process.name()
    return None


def _session(process: psutil.Process) -> int | None:
    with suppress(OSError):
        return os.getsid(process.pid)
    return None


def kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to each of them; one that has ended already is none of our business."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def freeze(pids: Iterable[int]) -> None:
    """SIGSTOP, and wait until they stand still."""
    kill(pids, signal.SIGSTOP)
    for pid in pids:
        while _state(pid) in "RSD":
            pass


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def in_slices(pids: list[int], found: Callable[[], object], over: Callable[[], bool], slice_s: float = 1e-4) -> object:
    """Let the processes run in slices of time until found() returns something while they stand still, and leave them
    standing; or until over(), and let them go on. Returns what found() did, or None."""
    with _first_on_its_core():
        while True:
            freeze(pids)
            if (seen := found()) is not None:
                return seen
            kill(pids, signal.SIGCONT)
            if over():
                return None
            until = time.perf_counter() + slice_s
            while time.perf_counter() < until:
                pass


@contextmanager
def _first_on_its_core():
    """Real-time priority, where it may be had: on a busy machine the processes would run on while this one waits."""
    before = os.sched_getscheduler(0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


def steps_done(run: Path) -> int:
    """The last step that metrics.jsonl has a whole line of; -1 before the first."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return -1
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((json.loads(line)["step"] for line in lines), default=-1)


def read_losses(run: Path) -> dict[int, float]:
    """Step -> training loss, of the whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return {value["step"]: value["train/loss"] for value in values if "train/loss" in value}


def saved_step(run: Path) -> int | None:
    """The step that `--resume latest` would go on from; None before the first checkpoint."""
    latest = run / "checkpoints" / "latest"
    if not latest.is_file():
        return None
    return json.loads((latest.parent / latest.read_text().strip() / "checkpoint.json").read_text())["step"]


def last_words(job: Job) -> str:
    """Our own line of a rank that failed or stopped, of the one that knows more; "" when none printed one."""
    outputs = "\n".join(job.outputs()).replace("\r", "\n")
    lines = re.findall(r"agrepa train: .*|step \d+: stopped by a signal.*", outputs)
    return min(lines, key=lambda line: "another rank ended" in line, default="")


@contextmanager
def small_disk(folder: Path, size: int):
    """A tmpfs of `size` bytes at `folder` inside a `with`, which gets a function that makes room on it. Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
