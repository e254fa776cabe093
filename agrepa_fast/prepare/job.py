"""What every stage of a preparation needs: domain, ranks, a bar, a line about its throughput, and its work files.

A stage keeps what it makes of each clip in a file of its own below <out>/.work, written atomically, so that a run which
was interrupted at any moment goes on, on any number of ranks.
"""

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import DataConfig
from ..files import write_atomically
from ..ranks import Ranks

WORK = ".work"
REPORT = "prepare.json"  # how fast each stage was; not in index.json, which is the same whenever it is written


@dataclass(frozen=True)
class Job:
    """The preparation of one domain."""

    data: DataConfig
    out: Path
    domain: str
    ranks: Ranks
    pool: ThreadPoolExecutor
    throughput: dict[str, dict] = field(default_factory=dict)  # stage -> figures; on rank 0

    def folder(self, kind: str, digest: str, alone: bool = False) -> Path:
        """The folder of a stage's results, which whatever they depend on names. `alone`: what they describe is outside,
        and about to be overwritten, so that those with another digest are forgotten; every rank must call it."""
        work = self.out / WORK
        folder = work / f"{self.domain}-{kind}-{digest}"
        if alone:
            self.ranks.on_rank_0(lambda: remove(f for f in work.glob(f"{self.domain}-{kind}-*") if f != folder))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def say(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(line)

    @contextmanager
    def stage(self, name: str, clips: int) -> Iterator["Stage"]:
        """A stage in which this rank has `clips` to do; all ranks end it together."""
        world = self.ranks.world
        part = f", rank 0 of {world}" if world > 1 else ""
        with tqdm(total=clips, desc=f"{self.domain}: {name}{part}", unit="clip", disable=self.ranks.rank > 0) as bar:
            stage = Stage(self.ranks, bar)
            yield stage
        wall = time.monotonic() - stage.started
        each = np.array(self.ranks.all_gather((stage.clips, stage.found, stage.audio, wall)))
        wall = each[:, 3].max()
        clips, found, audio = each[:, :3].sum(axis=0)
        before = f", {found:.0f} were there" if found else ""
        self.say(
            f"{self.domain}: {name}: {clips:.0f} clips ({audio:.0f} s of audio) in {wall:.1f} s on {world} rank"
            f"{'s' * (world > 1)}: {clips / wall:.1f} clips/s, {audio / wall:.0f} x real time{before}"
        )
        figures = {"ranks": world, "clips": int(clips), "found": int(found)}
        times = {"audio_s": audio, "wall_s": wall, "clips_per_s": clips / wall, "x_real_time": audio / wall}
        self.throughput[name] = figures | {name: round(float(value), 2) for name, value in times.items()}


@dataclass
class Stage:
    """Counts of this rank in a running stage."""

    ranks: Ranks
    bar: tqdm
    clips: int = 0  # computed
    audio: float = 0.0  # seconds of them
    found: int = 0  # computed by an earlier run
    started: float = field(default_factory=time.monotonic)

    def done(self, seconds: float) -> None:
        """A clip of so many seconds has been computed."""
        self.clips, self.audio = self.clips + 1, self.audio + seconds
        self.bar.update()
        self.ranks.check_others()

    def skip(self, clips: int = 1) -> None:
        """The results of so many clips were there."""
        self.found += clips
        self.bar.update(clips)
        self.ranks.check_others()


def write_report(out: Path, throughput: dict[str, dict]) -> None:
    """Throughput by domain and stage into prepare.json, beside that of other domains."""
    path = out / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    for domain, stages in throughput.items():
        report[domain] = {**report.get(domain, {}), **stages}
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())


def remove(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder)


def work_file(folder: Path, name: str) -> Path:
    """The file of that name below a stage's folder: one folder of a million files is slow on network file systems."""
    return folder / hashlib.sha1(name.encode()).hexdigest()[:2] / name


def write_work(file: Path, **arrays) -> None:
    """The .npz of a clip, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        write_atomically(file, buffer.getvalue())
    except FileNotFoundError:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, buffer.getvalue())


def work_names(folder: Path) -> set[str]:
    """Names of all files that work_file has placed below a folder: 256 listings instead of a look for each."""
    return {name for part in folder.iterdir() if part.is_dir() for name in os.listdir(part)}  # noqa: PTH208 - names alone
