"""The faults of faults.py. Each waits for its moment in a run, then strikes."""

import os
import shutil
import signal
import tarfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..data.server import Server, serving
from .harness import BOUND, Job, freeze, kill, last_step, run_in_slices, saved_step, small_disk, start

STEPS, SAVE_EVERY = 24, 5
MOMENT = 12  # the step after which a fault strikes: two checkpoints exist, and the second epoch of the clips has begun
MARKER = "checkpoint.json"  # completes a checkpoint
POINTERS = ("latest", "best")  # files beside the checkpoints, each with the name of one
CHECKPOINT_FILES = (  # of 2 ranks at ZeRO 2, in the order of writing
    *("zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "rank1.safetensors"),
    *("zero_pp_rank_0_mp_rank_00_optim_states.pt", "rank0.safetensors", "model.safetensors", "state.pt"),
    *("heads.safetensors", "ema.safetensors", "config.yaml", "shards.json", "selection.json", MARKER),
)


@dataclass
class Target:
    """A run to strike."""

    run: Path
    preset: Path
    whole: Path  # the run folder of the same training without the fault
    stack: ExitStack  # closed after the case
    job: Job | None = None
    resume_arguments: tuple[str, ...] = ()
    repairs: list[Callable[[], object]] = field(default_factory=list)  # called before the resume
    ends_by_itself: bool = True  # False: a process was frozen, and must be killed
    server: Server | None = None
    shards: Path | None = None  # a copy of the shards if the fault damages them

    def data_path(self, injection: "Injection") -> str:
        """Return data.path: shards that may be damaged, or their URL on a server of our own."""
        self.shards = self.preset.parent
        if injection.damages_shards:
            self.shards = self.run.with_name("shards")
            shutil.copytree(self.preset.parent, self.shards)
        if not injection.remote:
            return str(self.shards)
        self.server = self.stack.enter_context(serving(self.shards))
        return self.server.url

    def limit_disk(self, checkpoints: float) -> None:
        """Put the run's folder on a disk with room for so many checkpoints."""
        size = sum(file.stat().st_size for file in newest_checkpoint(self.whole).iterdir())
        self.repairs.append(self.stack.enter_context(small_disk(self.run, int(size * checkpoints))))

    def wait_for_step(self, step: int) -> int:
        """Wait for the end of an optimizer step. Returns the step that runs then."""
        self.job.wait_until(lambda: last_step(self.run) >= step, interval=0.01)
        return last_step(self.run) + 1

    def complete_checkpoints(self) -> set[Path]:
        return {marker.parent for marker in (self.run / "checkpoints").glob(f"*/{MARKER}")}


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob(f"*/{MARKER}"), key=lambda path: path.stat().st_mtime_ns).parent


@dataclass
class Injection:
    """A fault and the promises that must hold through it."""

    name: str
    strike: Callable[[Target], str]  # returns a sentence: the event and its moment
    stage: int = 2
    settings: tuple[str, ...] = ()
    promised: int = SAVE_EVERY  # steps that may be lost: those since the last save; 0 if the run can save or continue
    launched: bool = False  # by the deepspeed launcher
    documented: bool = False  # the launcher's exit code and silence are shown, not judged
    damages_shards: bool = False
    remote: bool = False  # shards are read from an http server
    disk: float | None = None  # room for so many checkpoints
    bound: float = BOUND  # seconds within which all processes must have ended

    def __str__(self) -> str:
        return f"{self.name} (ZeRO {self.stage})"


def send(number: signal.Signals, *ranks: int, after: int = MOMENT) -> Callable[[Target], str]:
    def strike(target: Target) -> str:
        step = target.wait_for_step(after)
        pids = target.job.ranks()
        kill([pids[rank] for rank in ranks], number)
        return f"{number.name} to rank {' and '.join(map(str, ranks))} in step {step}"

    return strike


def kill_loader(target: Target) -> str:
    step = target.wait_for_step(MOMENT)
    kill([target.job.loaders(1)[0]])
    return f"SIGKILL to a loader process of rank 1 in step {step}"


def signal_launcher(number: signal.Signals) -> Callable[[Target], str]:
    def strike(target: Target) -> str:
        step = target.wait_for_step(MOMENT)
        kill([target.job.started[0].pid], number)
        return f"{number.name} to `deepspeed` in step {step}"

    return strike


def kill_in_save(name: str) -> Callable[[Target], str]:
    """Kill the rank that writes this file of a checkpoint while the file is partly written; the other rank goes on and
    finds out. A file that was not seen partly written in two saves is cut in half by hand in the third, except the
    files that a rename puts in place: these are never partly written."""
    rank = 1 if "rank1" in name or "rank_1" in name else 0

    def strike(target: Target) -> str:
        pids, checkpoints = target.job.ranks(), target.run / "checkpoints"
        final = max(path.stat().st_size for path in (target.whole / "checkpoints").rglob(name))
        target.wait_for_step(SAVE_EVERY + 1)
        for attempt in (1, 2, 3):
            known, saved = target.complete_checkpoints(), saved_step(target.run)
            target.job.wait_until(lambda known=known: _has_unfinished(checkpoints, known))

            def partly_written(known=known, attempt=attempt) -> tuple[Path, int] | None:
                files = _written(checkpoints, name, known)
                return next(((f, size) for f, size in files if attempt == 3 or 0 < size < final), None)

            def over(saved=saved) -> bool:
                return saved_step(target.run) != saved or not target.job.alive()

            seen = run_in_slices(pids, partly_written, over)
            if seen is None and attempt < 3:
                continue
            file, size = seen or (None, final)
            amount = f"{size} of {final} bytes"
            if size == final and file is not None and name not in (MARKER, *POINTERS):
                os.truncate(file, final // 2)
                amount = f"all of its bytes, cut to {final // 2}"
            kill([pids[rank]])
            kill(pids, signal.SIGCONT)
            return f"SIGKILL to rank {rank} with {amount} of {name} written"

    return strike


def _has_unfinished(checkpoints: Path, known: set[Path]) -> bool:
    return any(path.is_dir() and path not in known for path in checkpoints.iterdir())


def _written(checkpoints: Path, name: str, known: set[Path]) -> list[tuple[Path, int]]:
    """Return the paths and sizes, outside the complete checkpoints, of the file and of its temporary names."""
    files = []
    for folder, _, names in os.walk(checkpoints):
        for path in (Path(folder, file) for file in names if name in file and file not in POINTERS):
            with suppress(FileNotFoundError):
                files += [(path, path.stat().st_size)] if path.parent not in known else []
    return files


def damage_incomplete_save(target: Target) -> str:
    """Kill all ranks when a save lacks only its marker, then cut each of its files in half."""
    pids, checkpoints = target.job.ranks(), target.run / "checkpoints"
    wanted = {path.name for path in newest_checkpoint(target.whole).iterdir() if path.is_file()} - {MARKER}
    target.wait_for_step(SAVE_EVERY + 1)
    for _ in range(3):
        known, saved = target.complete_checkpoints(), saved_step(target.run)
        target.job.wait_until(lambda known=known: _has_unfinished(checkpoints, known))

        def all_but_the_marker(known=known) -> Path | None:
            new = {path for path in checkpoints.iterdir() if path.is_dir()} - known
            names = {path: {file.name for file in path.iterdir()} for path in new}
            return next((path for path in new if names[path] >= wanted and MARKER not in names[path]), None)

        folder = run_in_slices(pids, all_but_the_marker, lambda saved=saved: saved_step(target.run) != saved)
        if folder is not None:
            kill(pids)
            for file in folder.iterdir():
                os.truncate(file, file.stat().st_size // 2)
            return f"SIGKILL to both ranks before {MARKER} exists, then every file of the save cut in half"
    raise RuntimeError("no save was seen before its end")


def resume_while_running(target: Target) -> str:
    """Resume a run that still goes on, as a user may whose launcher was killed."""
    step, first = target.wait_for_step(MOMENT), target.job.ranks()
    freeze(first)  # else it might end before the second job starts
    second = start(2, *target.resume_arguments, cwd=target.run.parent / "second")
    target.stack.callback(second.kill)
    codes = second.wait()
    kill(first, signal.SIGCONT)
    line = next((line for line in second.outputs()[0].splitlines() if "agrepa train: " in line), "went on")
    return f"resumed by other processes in step {step}, which end with {codes}: {line}"


def freeze_rank(target: Target) -> str:
    """Freeze a rank, as a machine that no longer answers: no connection is closed."""
    step = target.wait_for_step(MOMENT)
    freeze([target.job.ranks()[1]])
    target.ends_by_itself = False
    return f"rank 1 stands still (SIGSTOP) from step {step} on"


def truncate_shard(target: Target) -> str:
    """Cut a shard after the check at the start, as a disk that loses data while the run reads."""
    step = target.wait_for_step(MOMENT - 4)
    shard = sorted(target.shards.glob("train-speech-*.tar"))[1]
    content = shard.read_bytes()
    os.truncate(shard, len(content) // 2)
    target.repairs.append(lambda: shard.write_bytes(content))
    return f"{shard.name} cut in half in step {step}"


def spoil_sample(target: Target) -> str:
    """Make one value of one mel NaN; the tar stays valid."""
    step = target.wait_for_step(MOMENT - 4)
    shard = sorted(target.shards.glob("train-audio-*.tar"))[0]
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".mel.npy"))
    spoiled = bytearray(content)
    spoiled[member.offset_data + member.size - 2 : member.offset_data + member.size] = b"\x00\x7e"  # fp16 NaN
    shard.write_bytes(spoiled)
    target.repairs.append(lambda: shard.write_bytes(content))
    return f"a NaN in {member.name} of {shard.name} in step {step}"


def keep_disk_full(target: Target) -> str:
    """Leave the disk full: training goes on, and the last save, which must succeed, fails."""
    target.wait_for_step(STEPS)
    return "no save after the first finds space"


def make_room_after_a_save(target: Target) -> str:
    step = target.wait_for_step(2 * SAVE_EVERY + 1)
    for repair in target.repairs:
        repair()
    return f"the save of step {2 * SAVE_EVERY} finds no space; room is made in step {step}"


def spoil_answers(mood: str, answers: int) -> Callable[[Target], str]:
    """Let an http server spoil its next answers for each shard; moods: those of Server."""

    def strike(target: Target) -> str:
        step = target.wait_for_step(MOMENT - 4)
        target.server.moods = defaultdict(lambda: [mood] * answers)
        target.repairs.append(lambda: setattr(target.server, "moods", defaultdict(list)))
        return f"the next {answers} answers for each shard {mood}, from step {step} on"

    return strike


_LOADER = ("data.workers=1",)
_REMOTE = ("data.read_attempts=3", "data.read_timeout=5")
INJECTIONS = [
    Injection("kill -9 of rank 0 in a step", send(signal.SIGKILL, 0)),
    Injection("kill -9 of rank 1 in a step", send(signal.SIGKILL, 1)),
    Injection("kill -9 of rank 1 in a step", send(signal.SIGKILL, 1), stage=3),
    Injection("kill -9 of both ranks at once", send(signal.SIGKILL, 0, 1), settings=_LOADER),
    Injection("kill -9 of both ranks before the first save", send(signal.SIGKILL, 0, 1, after=SAVE_EVERY - 3)),
    Injection("kill -9 of a loader process", kill_loader, settings=_LOADER),
    Injection("a rank stands still", freeze_rank, settings=("train.patience=0.3",)),
    *(Injection(f"kill -9 in a save: {name}", kill_in_save(name)) for name in [*CHECKPOINT_FILES, "latest"]),
    Injection("kill -9 in a save: rank1.safetensors", kill_in_save("rank1.safetensors"), stage=3),
    Injection("damaged incomplete save", damage_incomplete_save),
    Injection("disk full in one save", make_room_after_a_save, disk=1.5, promised=0),
    Injection("disk full to the end", keep_disk_full, disk=1.5, promised=STEPS - SAVE_EVERY),
    Injection("SIGTERM to rank 1", send(signal.SIGTERM, 1), promised=0, settings=_LOADER),
    Injection("SIGTERM to both ranks", send(signal.SIGTERM, 0, 1), promised=0, stage=3),
    Injection("SIGUSR1 to rank 0", send(signal.SIGUSR1, 0), promised=0),
    Injection("a second run in the same folder", resume_while_running, promised=0),
    Injection("truncated shard", truncate_shard, damages_shards=True),
    Injection("corrupt sample", spoil_sample, damages_shards=True, settings=_LOADER),
    Injection(
        "http server dies in a shard, and comes back",
        spoil_answers("die", 2),
        remote=True,
        settings=_REMOTE,
        promised=0,
    ),
    Injection("http server stalls once", spoil_answers("stall", 1), remote=True, settings=_REMOTE, promised=0),
    Injection("http server dies for good", spoil_answers("die", 10_000), remote=True, settings=_REMOTE),
    Injection("launcher: kill -9 of rank 1", send(signal.SIGKILL, 1), launched=True, documented=True),
    Injection("launcher: SIGTERM to it", signal_launcher(signal.SIGTERM), launched=True, documented=True),
    Injection("launcher: kill -9 of it", signal_launcher(signal.SIGKILL), launched=True, documented=True),
]
