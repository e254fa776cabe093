"""The jobs of a comparison: warm-ups, branches and evaluations, each the real program in a process of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints.find import complete_checkpoints
from ..errors import UserError
from ..files import FolderLock, read_json, write_atomically
from ..launch import free_port

_ATTEMPTS = 2
ANOTHER = "choose another --out"
_TRAIN = Path(__file__).parents[1] / "train.py"
_LAUNCHER = (
    sys.executable,
    "-m",
    "deepspeed.launcher.runner",
)  # `deepspeed`, also without its script
_PLACES = {sys.executable: "python", str(_TRAIN): "agrepa_fast/train.py"}  # as a plan names them on every machine


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: settings under a label. strategy: its align.strategy."""

    label: str
    strategy: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Return the arm of a strategy, such as `foga` or `fixed:4,8`, or of LABEL:section.field=value,…: that one has
        the strategy of its overrides, or else foga."""
        label, colon, rest = text.partition(":")
        if not colon or "=" not in rest:
            return cls(text, text)
        overrides = split_overrides(rest)
        given = [value for name, _, value in (o.partition("=") for o in overrides) if name == "align.strategy"]
        return cls(
            label, given[-1] if given else "foga", tuple(o for o in overrides if not o.startswith("align.strategy="))
        )


def split_overrides(text: str) -> tuple[str, ...]:
    """Return section.field=value,… as a tuple; commas inside a value stay. An empty text has none."""
    return tuple(re.split(r",(?=[a-z_]+\.)", text)) if text else ()


@dataclass(frozen=True)
class Job:
    """One command. folder: of the run, or of the evaluation inside it. done: a file that exists once the job has
    finished. steps: optimizer steps, for the time left; 0 marks an evaluation, which is not resumed."""

    name: str
    command: tuple[str, ...]
    folder: Path
    done: Path
    steps: int = 0

    @property
    def finished(self) -> bool:
        return self.done.is_file()


@dataclass(frozen=True)
class Experiment:
    """Strategies by seeds from one warm-up per seed, in folders below `out`."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    preset: str
    warmup: int  # steps before the branches
    steps: int  # of a branch
    out: Path
    ds_config: str
    ranks: int | None  # None: as many as the launcher finds
    overrides: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()  # overrides of agrepa evaluate
    measured: frozenset[str] = field(default=frozenset())  # strategies that measure layers

    def run_folder(self, arm: Arm, seed: int) -> Path:
        return self.out / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', arm.label)}-seed{seed}"

    def warmup_folder(self, seed: int) -> Path:
        return self.out / f"warmup-seed{seed}"

    def jobs(self) -> list[Job]:
        """Return all jobs in the order of their running."""
        jobs = []
        for seed in self.seeds:
            warmup = self.warmup_folder(seed)
            # A constant rate: its decay would end with the warm-up, and begin again in the branch.
            settings = ("align.strategy=none", f"train.steps={self.warmup}", "train.final_lr=1.0")
            jobs.append(self._train(f"warm-up, seed {seed}", warmup, seed, self.warmup, settings))
            for arm in self.arms:  # with a warm-up of the rate: AdamW's first steps have its full length
                folder = self.run_folder(arm, seed)
                settings = (f"align.strategy={arm.strategy}", f"train.steps={self.steps}", f"train.start_from={warmup}")
                if arm.strategy in self.measured:
                    settings += ("probe.start_step=1", "probe.warmup_steps=1")
                jobs.append(
                    self._train(f"{arm.label}, seed {seed}", folder, seed, self.steps, settings + arm.overrides)
                )
                evaluate = (sys.executable, "-m", "agrepa_fast.cli", "evaluate", str(folder), "--out")
                out = folder / "evaluate"
                jobs.append(
                    Job(
                        f"evaluate {arm.label}, seed {seed}",
                        (*evaluate, str(out), *self.metrics),
                        out,
                        out / "results.json",
                    )
                )
        return jobs

    def _train(self, name: str, folder: Path, seed: int, steps: int, settings: Sequence[str]) -> Job:
        program = ("--preset", self.preset, "--ds_config", self.ds_config)
        settings = (*self.overrides, *settings, f"run.seed={seed}")
        return training_job(name, folder, (*program, *settings), steps, self.ranks)


def training_job(name: str, folder: Path, arguments: Sequence[str], steps: int, ranks: int | None = None) -> Job:
    """Return a training into `folder` through DeepSpeed's launcher. arguments: of the training program; of the settings
    with one name, the last counts. ranks: None for as many as the launcher finds."""
    launcher = [*_LAUNCHER, *([] if ranks is None else ["--num_gpus", str(ranks)])]
    return Job(name, (*launcher, str(_TRAIN), *arguments, f"run.dir={folder}"), folder, folder / "summary.json", steps)


def write_plan(jobs: Sequence[Job], file: Path, remedy: str = ANOTHER) -> None:
    """Write the jobs, beside those of earlier calls, as `merge_plan` returns them."""
    plan = merge_plan(jobs, file, remedy)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(list(plan.values()), indent=1) + "\n")


def merge_plan(jobs: Sequence[Job], file: Path, remedy: str = ANOTHER) -> dict[str, dict]:
    """Return the jobs by folder, with those of earlier calls: arms and seeds may be added, and an evaluation that has
    not finished may change. Raises UserError, which ends with `remedy`, if an earlier job in the folder of one of them
    had other settings, and for the folder of a run of no comparison: `run_jobs` would remove it if it has no
    checkpoint."""
    plan = _read_plan(file, remedy) if file.is_file() else {}
    for job in jobs:
        folder, command = str(job.folder), [_PLACES.get(part, part) for part in job.command]
        if folder not in plan and job.folder.exists():
            raise UserError(f"{job.folder} is there, and not of this comparison: {remedy}")
        there = plan.get(folder, {}).get("command", command)
        change = _change(there, command)
        if change is not None and (job.steps or job.finished):
            again = "" if job.steps else f"remove {job.folder} to evaluate again, or "
            raise UserError(f"{file.parent} holds another comparison ({change}): {again}{remedy}")
        plan[folder] = {"name": job.name, "command": command, "folder": folder}
    return plan


def _change(before: Sequence[str], after: Sequence[str]) -> str | None:
    """Return the first setting in which two commands differ, None if they agree. Of one name, the last counts."""
    old, new = _by_name(before), _by_name(after)
    name = next((name for name in {**old, **new} if old.get(name) != new.get(name)), None)
    return None if name is None else f"{old.get(name, f'no {name}')}, now {new.get(name, f'no {name}')}"


def _by_name(command: Sequence[str]) -> dict[str, str]:
    """Return name -> "name=value" or "--name value" of a command's settings; other parts stand for themselves."""
    found, parts = {}, iter(command)
    for part in parts:
        name = part.partition("=")[0]
        found[name] = f"{part} {next(parts, '')}" if part.startswith("--") and name == part else part
    return found


def _read_plan(file: Path, remedy: str) -> dict[str, dict]:
    """Return the jobs of a plan by folder."""
    jobs = read_json(file, remedy)
    try:
        return {job["folder"]: {**job, "command": [*job["command"]]} for job in jobs}
    except (TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged: {remedy}") from error


def run_jobs(jobs: Sequence[Job], say: Callable[[str], object]) -> list[Job]:
    """Run the jobs that are not finished, one after the other, and return those that failed twice, or that need one
    that did. An unfinished run goes on from its last checkpoint. A signal ends the running job, which saves, and then
    raises KeyboardInterrupt. Raises UserError if another process trains in the folder of a job."""
    failed: list[Job] = []
    seconds, steps = 0.0, 0
    for number, job in enumerate(jobs, 1):
        if job.finished:
            continue
        if any(f"train.start_from={one.folder}" in job.command or one.folder == job.folder.parent for one in failed):
            failed.append(job)  # what it needs is missing
            continue
        left = sum(one.steps for one in jobs[number - 1 :] if not one.finished)
        about = f", about {left * seconds / steps / 60:.0f} min of training left" if steps else ""
        say(f"[{number}/{len(jobs)}] {job.name}{about}")
        started = time.monotonic()
        if not any(_run(job) for _ in range(_ATTEMPTS)):
            say(f"{job.name}: failed twice; its output is in {_log(job)}")
            failed.append(job)
        elif job.steps:
            seconds, steps = seconds + time.monotonic() - started, steps + job.steps
    return failed


def _run(job: Job) -> bool:
    """Run a job once. Return whether it finished. Raises KeyboardInterrupt after a signal: the job had it, too, and a
    training has saved."""
    signals: list[int] = []
    with _log(job).open("ab") as log:
        # A session of its own: Ctrl-C would end its ranks at once, SIGTERM lets them save.
        process = subprocess.Popen(
            _with_port(_command(job)), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

        def hand_on(number: int, _frame: object) -> None:
            signals.append(number)
            os.killpg(process.pid, signal.SIGTERM)

        handed_on = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            handed_on.append(signal.SIGHUP)
        before = {number: signal.signal(number, hand_on) for number in handed_on}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if signals:
        raise KeyboardInterrupt
    return code == 0 and job.finished


def _command(job: Job) -> tuple[str, ...]:
    if not job.steps or not job.folder.exists():
        return job.command
    with FolderLock(job.folder, ANOTHER):  # a training that outlived its comparison
        if complete_checkpoints(job.folder / "checkpoints"):
            return (*job.command, "--resume", "latest")
        shutil.rmtree(job.folder)  # it ended before its first checkpoint
    return job.command


def _with_port(command: tuple[str, ...]) -> tuple[str, ...]:
    """Return a command whose ranks meet at a free port, if it is DeepSpeed's launcher: its own choice is always 29500,
    which another run may use."""
    length = len(_LAUNCHER)
    if command[:length] != _LAUNCHER:
        return command
    return (*_LAUNCHER, "--master_port", free_port(), *command[length:])


def _log(job: Job) -> Path:
    """Return the file of a job's output, beside its folder: a new run wants an empty one."""
    folder = job.folder if job.steps else job.folder.parent
    return folder.with_name(f"{folder.name}{'' if job.steps else '-evaluate'}.log")
