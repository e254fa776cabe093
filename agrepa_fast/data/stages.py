"""What every stage of a preparation needs: domain, ranks, a bar, a line about its throughput, and its work files.

A stage keeps what it makes of each clip in a file of its own below <out>/.work, written atomically, so that a run which
was interrupted at any moment goes on, on any number of ranks.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import DataConfig
from .ranks import Ranks
from .shards import write_atomically

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

    def folder(self, kind: str, digest: str) -> Path:
        """The folder of a stage's results, which whatever they depend on names."""
        folder = self.out / WORK / f"{self.domain}-{kind}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def say(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(line)

    @contextmanager
    def stage(self, name: str, clips: int) -> Iterator["Stage"]:
        """A stage in which this rank has `clips` to do; all ranks end it together."""
        world = self.ranks.world
        part = f" (a {world}th)" if world > 2 else " (half)" if world == 2 else ""
        with tqdm(total=clips, desc=f"{self.domain}: {name}{part}", unit="clip", disable=self.ranks.rank > 0) as bar:
            stage = Stage(self.ranks, bar)
            yield stage
        seconds = time.monotonic() - stage.started
        each = self.ranks.gather((stage.clips, stage.audio, seconds, stage.found))
        clips, audio, wall, found = (
            sum(x[0] for x in each),
            sum(x[1] for x in each),
            max(x[2] for x in each),
            sum(x[3] for x in each),
        )
        figures = {"ranks": world, "clips": clips, "audio_s": round(audio, 1), "wall_s": round(wall, 2), "found": found}
        figures |= {"clips_per_s": round(clips / wall, 2), "x_real_time": round(audio / wall, 1)}
        self.throughput[name] = figures
        before = f", {found} were there" if found else ""
        self.say(
            f"{self.domain}: {name}: {clips} clips ({audio:.0f} s of audio) in {wall:.1f} s on {world} "
            f"rank{'s' * (world > 1)}: {clips / wall:.1f} clips/s, {audio / wall:.0f} x real time{before}"
        )


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
        self.ranks.poll()

    def skip(self, clips: int = 1) -> None:
        """The results of so many clips were there."""
        self.found += clips
        self.bar.update(clips)
        self.ranks.poll()


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
