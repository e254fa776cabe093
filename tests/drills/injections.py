"""The faults of faults.py: each waits for its moment in a run, and strikes."""

import os
import shutil
import signal
import tarfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from _processes import BOUND, Job, freeze, in_slices, kill, saved_step, small_disk, start, steps_done

from agrepa_fast.config import DataConfig

STEPS, SAVE_EVERY = 24, 5
MOMENT = 12  # the step after which a fault strikes: two checkpoints are there, and the clips' second epoch runs
MARKER = "checkpoint.json"
NAMES = ("latest", "best")  # files beside the checkpoints that name one


@dataclass
class Scene:
    """A run that something happens to."""

    run: Path
    preset: Path
    whole: Path  # the same run without the fault
    stack: ExitStack  # undone when the row is done
    job: Job | None = None
    resume_arguments: tuple[str, ...] = ()
    repairs: list[Callable[[], object]] = field(default_factory=list)  # before the resume
    ends_by_itself: bool = True  # False: a process was stopped, and must be killed
    server: object = None  # tests/data/server.py's
    shards: Path | None = None  # a copy of the shards that a fault may damage

    def data_path(self, fault: "Fault") -> str:
        """Shards that this fault may damage, or have served."""
        self.shards = self.preset.parent
        if fault.damages_shards:
            self.shards = self.run.with_name("shards")
            shutil.copytree(self.preset.parent, self.shards)
        if not fault.remote:
            return str(self.shards)
        from tests.data.server import serving

        self.server = self.stack.enter_context(serving(self.shards))
        return self.server.url

    def small_disk(self, checkpoints: float) -> None:
        """The run's folder on a disk with room for so many checkpoints."""
        size = sum(file.stat().st_size for file in newest_checkpoint(self.whole).iterdir())
        self.repairs.append(self.stack.enter_context(small_disk(self.run, int(size * checkpoints))))

    def step(self, step: int) -> None:
        """Wait for the end of an optimizer step; the next one has begun."""
        self.job.until(lambda: steps_done(self.run) >= step)

    def complete(self) -> set[Path]:
        return {marker.parent for marker in (self.run / "checkpoints").glob(f"*/{MARKER}")}


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob(f"*/{MARKER}"), key=lambda path: path.stat().st_mtime_ns).parent


@dataclass
class Fault:
    name: str
    inject: Callable[[Scene], str]  # returns what it did, and when
    stage: int = 2
    settings: tuple[str, ...] = ()
    promised: int = SAVE_EVERY  # steps that may be lost: those since the last save; 0 when the run can save or go on
    launched: bool = False  # by the deepspeed launcher
    documented: bool = False  # what the launcher does is not ours: its exit code and its silence are only shown
    damages_shards: bool = False
    remote: bool = False  # shards are read from an http server
    disk: float | None = None  # room for so many checkpoints
    bound: float = BOUND  # seconds within which everything must have ended


def send(number: signal.Signals, *ranks: int) -> Callable[[Scene], str]:
    def inject(scene: Scene) -> str:
        scene.step(MOMENT)
        pids = scene.job.ranks()
        kill([pids[rank] for rank in ranks], number)
        return f"{number.name} to rank {' and '.join(map(str, ranks))} in step {steps_done(scene.run) + 1}"

    return inject


def kill_loader(scene: Scene) -> str:
    scene.step(MOMENT)
    loader = scene.job.loaders(1)[0]
    kill([loader])
    return f"SIGKILL to a loader process of rank 1 in step {steps_done(scene.run) + 1}"


def signal_launcher(number: signal.Signals) -> Callable[[Scene], str]:
    def inject(scene: Scene) -> str:
        scene.step(MOMENT)
        kill([scene.job.started[0].pid], number)
        return f"{number.name} to `deepspeed` in step {steps_done(scene.run) + 1}"

    return inject


def kill_in_save(name: str) -> Callable[[Scene], str]:
    """Kill the rank that writes this file of a checkpoint while a part of it is there; the other rank goes on and finds
    out. Some files are written at once: what was not seen half written in two saves is cut into half by hand in the
    third; but not what a rename puts there, which is never half written."""
    victim = 1 if "rank1" in name or "rank_1" in name else 0

    def inject(scene: Scene) -> str:
        pids, checkpoints = scene.job.ranks(), scene.run / "checkpoints"
        final = max(path.stat().st_size for path in (scene.whole / "checkpoints").rglob(name))
        scene.step(SAVE_EVERY + 1)
        for attempt in (1, 2, 3):
            known, saved = scene.complete(), saved_step(scene.run)
            scene.job.until(lambda known=known: _unfinished(checkpoints, known))

            def part(known=known, attempt=attempt) -> tuple[Path, int] | None:
                files = _written(checkpoints, name, known)
                return next(((f, size) for f, size in files if attempt == 3 or 0 < size < final), None)

            seen = in_slices(pids, part, lambda saved=saved: saved_step(scene.run) != saved or not scene.job.alive())
            if seen is None and attempt < 3:
                continue
            file, size = seen or (None, final)
            how = f"{size} of {final} bytes"
            if size == final and file is not None and name not in (MARKER, *NAMES):
                os.truncate(file, final // 2)
                how = f"all of its bytes, cut to {final // 2}"
            kill([pids[victim]])
            kill(pids, signal.SIGCONT)
            return f"SIGKILL to rank {victim} with {how} of {name} written"

    return inject


def _unfinished(checkpoints: Path, known: set[Path]) -> bool:
    return any(path.is_dir() and path not in known for path in checkpoints.iterdir())


def _written(checkpoints: Path, name: str, known: set[Path]) -> list[tuple[Path, int]]:
    """The file, or what will be renamed to it, outside the complete checkpoints, and its size."""
    found = []
    for folder, _, files in os.walk(checkpoints):
        for path in (Path(folder, file) for file in files if name in file and file not in NAMES):
            with suppress(FileNotFoundError):
                found += [(path, path.stat().st_size)] if path.parent not in known else []
    return found


def damage_incomplete_save(scene: Scene) -> str:
    """Kill all ranks when a save has everything but its marker, and cut every file that is there into half."""
    pids, checkpoints = scene.job.ranks(), scene.run / "checkpoints"
    wanted = {path.name for path in newest_checkpoint(scene.whole).iterdir() if path.is_file()} - {MARKER}
    scene.step(SAVE_EVERY + 1)
    for _ in range(3):
        known, saved = scene.complete(), saved_step(scene.run)
        scene.job.until(lambda known=known: _unfinished(checkpoints, known))

        def all_but_the_marker(known=known) -> Path | None:
            new = {path for path in checkpoints.iterdir() if path.is_dir()} - known
            names = {path: {file.name for file in path.iterdir()} for path in new}
            return next((path for path in new if names[path] >= wanted and MARKER not in names[path]), None)

        folder = in_slices(pids, all_but_the_marker, lambda saved=saved: saved_step(scene.run) != saved)
        if folder is not None:
            kill(pids)
            for file in folder.iterdir():
                os.truncate(file, file.stat().st_size // 2)
            return f"SIGKILL to both ranks before {MARKER} is there, then every file of the save cut into half"
    raise RuntimeError("no save was seen before its end")


def second_run(scene: Scene) -> str:
    """Somebody resumes a run that still goes on, such as one whose launcher was killed."""
    scene.step(MOMENT)
    step, first = steps_done(scene.run) + 1, scene.job.ranks()
    freeze(first)  # or it might have ended before the second is there
    second = start(2, *scene.resume_arguments, cwd=scene.run.parent / "second")
    scene.stack.callback(second.kill)
    codes = second.end()
    kill(first, signal.SIGCONT)
    line = next((line for line in second.outputs()[0].splitlines() if "agrepa train: " in line), "went on")
    return f"resumed by other processes in step {step}, which end with {codes}: {line}"


def freeze_rank(scene: Scene) -> str:
    """A machine that answers no more: no connection is closed."""
    scene.step(MOMENT)
    frozen = scene.job.ranks()[1]
    freeze([frozen])
    scene.ends_by_itself = False
    return f"rank 1 stands still (SIGSTOP) from step {steps_done(scene.run) + 1} on"


def truncate_shard(scene: Scene) -> str:
    """After the start-up check: a disk that loses data while the run reads."""
    scene.step(MOMENT - 4)
    victim = sorted(scene.shards.glob("train-speech-*.tar"))[1]
    whole = victim.read_bytes()
    os.truncate(victim, len(whole) // 2)
    scene.repairs.append(lambda: victim.write_bytes(whole))
    return f"{victim.name} cut into half in step {steps_done(scene.run) + 1}"


def spoil_sample(scene: Scene) -> str:
    """One value of one mel becomes NaN; the tar stays a good tar."""
    scene.step(MOMENT - 4)
    victim = sorted(scene.shards.glob("train-audio-*.tar"))[0]
    whole = victim.read_bytes()
    with tarfile.open(victim) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".mel.npy"))
    spoiled = bytearray(whole)
    spoiled[member.offset_data + member.size - 2 : member.offset_data + member.size] = b"\x00\x7e"  # fp16 NaN
    victim.write_bytes(spoiled)
    scene.repairs.append(lambda: victim.write_bytes(whole))
    return f"a NaN in {member.name} of {victim.name} in step {steps_done(scene.run) + 1}"


def fill_disk(scene: Scene) -> str:
    """The disk stays full: training goes on, and the last save, which must succeed, cannot."""
    scene.step(STEPS)
    return "no save after the first finds space"


def fill_disk_for_a_while(scene: Scene) -> str:
    scene.step(2 * SAVE_EVERY + 1)
    step = steps_done(scene.run)
    for repair in scene.repairs:
        repair()
    return f"the save of step {2 * SAVE_EVERY} finds no space; room is made in step {step + 1}"


def break_server(answers: int) -> Callable[[Scene], str]:
    """Shards come from an http server, whose next answers for each of them end in the middle."""

    def inject(scene: Scene) -> str:
        scene.step(MOMENT - 4)
        scene.server.moods = defaultdict(lambda: ["die"] * answers)
        scene.repairs.append(lambda: setattr(scene.server, "moods", defaultdict(list)))
        return f"the next {answers} answers for every shard end in the middle, from step {steps_done(scene.run) + 1} on"

    return inject


def rows(whole: Path) -> list[Fault]:
    """All faults; the files of a checkpoint are those of the uninterrupted run."""
    loader = ("data.workers=1",)
    files = [file.name for file in sorted(newest_checkpoint(whole).iterdir(), key=lambda file: file.stat().st_mtime_ns)]
    return [
        Fault("kill -9 of rank 0 in a step", send(signal.SIGKILL, 0)),
        Fault("kill -9 of rank 1 in a step", send(signal.SIGKILL, 1)),
        Fault("kill -9 of rank 1 in a step", send(signal.SIGKILL, 1), stage=3),
        Fault("kill -9 of both ranks at once", send(signal.SIGKILL, 0, 1), settings=loader),
        Fault("kill -9 of a loader process", kill_loader, settings=loader),
        Fault("a rank stands still", freeze_rank, settings=("train.patience=0.3",)),
        *(Fault(f"kill -9 in a save: {name}", kill_in_save(name)) for name in [*files, "latest"]),
        Fault("kill -9 in a save: rank1.safetensors", kill_in_save("rank1.safetensors"), stage=3),
        Fault("damaged incomplete save", damage_incomplete_save),
        Fault("disk full in one save", fill_disk_for_a_while, disk=1.5, promised=0),
        Fault("disk full to the end", fill_disk, disk=1.5, promised=STEPS - SAVE_EVERY),
        Fault("SIGTERM to rank 1", send(signal.SIGTERM, 1), promised=0, settings=loader),
        Fault("SIGTERM to both ranks", send(signal.SIGTERM, 0, 1), promised=0, stage=3),
        Fault("SIGUSR1 to rank 0", send(signal.SIGUSR1, 0), promised=0),
        Fault("a second run in the same folder", second_run, promised=0),
        Fault("truncated shard", truncate_shard, damages_shards=True),
        Fault("corrupt sample", spoil_sample, damages_shards=True, settings=loader),
        *_server_rows(),
        Fault("launcher: kill -9 of rank 1", send(signal.SIGKILL, 1), launched=True, documented=True),
        Fault("launcher: SIGTERM to it", signal_launcher(signal.SIGTERM), launched=True, documented=True),
        Fault("launcher: kill -9 of it", signal_launcher(signal.SIGKILL), launched=True, documented=True),
    ]


def _server_rows() -> list[Fault]:
    """Where data.path may be a URL."""
    if not hasattr(DataConfig, "read_attempts"):
        return []
    settings = ("data.read_attempts=3", "data.read_timeout=5")
    return [
        Fault(
            "http server dies in a shard, and comes back", break_server(2), remote=True, settings=settings, promised=0
        ),
        Fault("http server dies for good", break_server(10_000), remote=True, settings=settings),
    ]
