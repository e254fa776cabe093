"""Start the ranks of a run as processes, watch them, freeze and kill them. All drills use this."""

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

from ..ranks import ROOT, rank_environments
from ..testing import metrics

BOUND = 60.0  # seconds within which a process must end
TOLERANCE = 1e-5  # largest difference of a loss or gradient norm between two runs that should be equal
_LOADER = "pt_data_worker"  # PyTorch's name for a DataLoader's processes


@dataclass
class Job:
    """The processes of one run: its ranks, or a launcher with the ranks below it."""

    started: list[subprocess.Popen]
    logs: list[Path]
    launched: bool

    def ranks(self) -> list[int]:
        """Return the process ids in the order of ranks. A launcher that is still starting has fewer."""
        if not self.launched:
            return [process.pid for process in self.started]
        pids = {}
        for process in _descendants(self.started[0].pid):
            with suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and process.name() != _LOADER and "RANK" not in process.parent().environ():
                    pids[int(rank)] = process.pid
        return [pids[rank] for rank in sorted(pids)]

    def loaders(self, rank: int) -> list[int]:
        """Return the process ids of a rank's loader processes."""
        return [process.pid for process in _descendants(self.ranks()[rank]) if _name(process) == _LOADER]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.started)

    def wait_until(self, condition: Callable[[], object], interval: float = 0.001, seconds: float = 180.0) -> None:
        """Check `condition` every `interval` seconds until it holds. Raises RuntimeError with the outputs if a process
        ends first, or after `seconds`."""
        over = time.monotonic() + seconds
        while not condition():
            if not self.alive() or time.monotonic() > over:
                raise RuntimeError("the condition did not come about:\n" + "\n".join(self.outputs()))
            time.sleep(interval)

    def wait(self, seconds: float = BOUND) -> list[int | None]:
        """Return the exit codes of the started processes; None for a process that still runs after `seconds`."""
        over = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self.started:
            try:
                codes.append(process.wait(max(0.0, over - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        return codes

    def finish(self) -> None:
        """Wait for an undisturbed run to end. Raises RuntimeError with the outputs when it fails."""
        codes = self.wait(300)
        self.kill()
        if any(codes):
            raise RuntimeError(f"exit codes {codes}:\n" + "\n".join(output[-3000:] for output in self.outputs()))

    def remaining(self) -> list[int]:
        """Return the ids of all processes of this job that still run, loader processes and orphans included."""
        sessions = {process.pid for process in self.started}  # each was started in a session of its own
        return [p.pid for p in psutil.process_iter() if _session(p) in sessions and _name(p) is not None]

    def wait_for_remaining(self, seconds: float) -> bool:
        """Return whether all processes of this job ended by themselves within `seconds`."""
        over = time.monotonic() + seconds
        while self.remaining():
            if time.monotonic() > over:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """Send SIGKILL to all processes of this job that still run."""
        kill(self.remaining())
        for process in self.started:
            process.wait()

    def outputs(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]

    def last_words(self) -> str:
        """Return the line with which this engine said why it ended; "" when it printed none."""
        outputs = "\n".join(self.outputs()).replace("\r", "\n")
        lines = re.findall(r"agrepa train: .*|step \d+: stopped by a signal.*", outputs)
        return min(lines, key=lambda line: "another rank ended" in line, default="")


def start(ranks: int, *arguments: str, cwd: Path, launched: bool = False, logs: Path | None = None) -> Job:
    """Start agrepa_fast/train.py in `cwd`: its ranks directly, or through the deepspeed launcher. Their outputs go to
    files in `logs` (default: cwd)."""
    script = str(ROOT / "agrepa_fast" / "train.py")
    commands, environments = [[sys.executable, script, *arguments]] * ranks, rank_environments(ranks)
    port = environments[0]["MASTER_PORT"]
    if launched:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        commands = [[launcher, "--num_gpus", str(ranks), "--master_port", port, script, *arguments]]
        ours = ("OMP_NUM_THREADS", "PYTHONPATH")  # the launcher sets the others
        environments = [{name: environments[0][name] for name in ours}]
    files = [(logs or cwd) / f"{'launcher' if launched else f'rank{n}'}-{port}.log" for n in range(len(commands))]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    started = []
    for command, environment, file in zip(commands, environments, files, strict=True):
        with file.open("w") as log:
            started.append(
                subprocess.Popen(
                    command,
                    env=os.environ | environment,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return Job(started, files, launched)


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _name(process: psutil.Process) -> str | None:
    """Return a process's name; None for one that has ended."""
    with suppress(psutil.Error):
        return None if process.status() == psutil.STATUS_ZOMBIE else process.name()
    return None


def _session(process: psutil.Process) -> int | None:
    with suppress(OSError):
        return os.getsid(process.pid)
    return None


def kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def freeze(pids: Iterable[int]) -> None:
    """Send SIGSTOP to processes and wait until they stand still."""
    kill(pids, signal.SIGSTOP)
    for pid in pids:
        while _state(pid) in "RSD":
            pass


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def run_in_slices(pids: list[int], look: Callable[[], object], over: Callable[[], bool], slice_s: float = 1e-4):
    """Let processes run for `slice_s` at a time and call look() in between, until it returns something. Returns that,
    with the processes frozen; or None, with the processes running, once over() holds."""
    with _realtime_priority():
        while True:
            freeze(pids)
            if (seen := look()) is not None:
                return seen
            kill(pids, signal.SIGCONT)
            if over():
                return None
            until = time.perf_counter() + slice_s
            while time.perf_counter() < until:
                pass


@contextmanager
def _realtime_priority():
    """Real-time priority if permitted: on a busy machine the watched processes would run on while this one waits."""
    before = os.sched_getscheduler(0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


@contextmanager
def small_disk(folder: Path, size: int):
    """Mount a tmpfs of `size` bytes at `folder` for as long as the `with` lasts; yields a function that makes room on
    it. Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def read_steps(run: Path) -> list[dict]:
    """Return the whole lines of a run's metrics.jsonl, which the run may be writing."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    """Return the last step in metrics.jsonl; -1 before the first."""
    return max((line["step"] for line in read_steps(run)), default=-1)


def saved_step(run: Path) -> int | None:
    """Return the step from which `--resume latest` continues; None before the first checkpoint."""
    latest = run / "checkpoints" / "latest"
    if not latest.is_file():
        return None
    return json.loads((latest.parent / latest.read_text().strip() / "checkpoint.json").read_text())["step"]


def curve_difference(run: Path, other: Path, after: int = -1, kinds: tuple[str, ...] = ("loss", "norm")) -> float:
    """Return the largest difference between two runs of any loss or gradient norm of the steps after `after`; infinity
    when the runs have different steps or names."""
    a, b = (
        {
            (step, name): value
            for step, values in metrics(folder).items()
            for name, value in values.items()
            if step > after and name.endswith(kinds)
        }
        for folder in (run, other)
    )
    return max(abs(a[key] - b[key]) for key in a) if a and a.keys() == b.keys() else float("inf")
