"""The tools of every stage of a preparation: domain, ranks, threads, a progress bar, and work files.

A stage keeps its result for each clip in a file of its own below <out>/.work. Files appear whole or not at all, so a
preparation that was killed at any moment goes on, on any number of ranks.
"""

import hashlib
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import DataConfig
from ..data.samples import parse_npy
from ..files import write_atomically
from ..ranks import Ranks

WORK = ".work"
REPORT = "prepare.json"  # throughput per stage; not in index.json, which does not depend on the machine


@dataclass(frozen=True)
class Job:
    """The preparation of one domain."""

    data: DataConfig
    out: Path
    domain: str
    ranks: Ranks
    pool: ThreadPoolExecutor
    throughput: dict[str, dict] = field(default_factory=dict)  # stage -> figures; on rank 0

    def work_folder(self, kind: str, inputs: object, *, only: bool = False) -> Path:
        """Return the work folder for `kind`, named by a digest of its inputs. With `only`, delete the folders of the
        same kind with other inputs first; every rank must call it then."""
        work = self.out / WORK
        folder = work / f"{self.domain}-{kind}-{digest(inputs)}"
        if only:
            others = f"{self.domain}-{kind}-*"
            self.ranks.on_rank_0(lambda: remove_folders(path for path in work.glob(others) if path != folder))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def print(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(line)

    @contextmanager
    def stage(self, name: str, clips: int) -> Iterator["Stage"]:
        """Show and record the progress of a stage in which this rank has `clips` to do. All ranks end it together."""
        world = self.ranks.world
        part = f", rank 0 of {world}" if world > 1 else ""
        with tqdm(total=clips, desc=f"{self.domain}: {name}{part}", unit="clip", disable=self.ranks.rank > 0) as bar:
            stage = Stage(self.ranks, bar)
            yield stage
        wall = time.monotonic() - stage.started
        of_ranks = np.array(self.ranks.all_gather((stage.clips, stage.kept, stage.audio, wall)))
        wall = of_ranks[:, 3].max()
        clips, kept, audio = of_ranks[:, :3].sum(axis=0)
        earlier = f", {kept:.0f} were there" if kept else ""
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        self.print(
            f"{self.domain}: {name}: {clips:.0f} clips ({audio:.0f} s of audio) in {wall:.1f} s on {ranks}: "
            f"{clips / wall:.1f} clips/s, {audio / wall:.0f} x real time{earlier}"
        )
        figures = {"ranks": world, "clips": int(clips), "found": int(kept)}
        times = {"audio_s": audio, "wall_s": wall, "clips_per_s": clips / wall, "x_real_time": audio / wall}
        self.throughput[name] = figures | {name: round(float(value), 2) for name, value in times.items()}


@dataclass
class Stage:
    """This rank's counts in a running stage."""

    ranks: Ranks
    bar: tqdm
    clips: int = 0  # computed
    audio: float = 0.0  # their seconds
    kept: int = 0  # computed by an earlier run
    started: float = field(default_factory=time.monotonic)

    def add(self, seconds: float, clips: int = 1) -> None:
        """Count clips that have been computed, `seconds` long together."""
        self.clips, self.audio = self.clips + clips, self.audio + seconds
        self.bar.update(clips)
        self.ranks.check_others()

    def skip(self, clips: int = 1) -> None:
        """Count clips whose results an earlier run has computed."""
        self.kept += clips
        self.bar.update(clips)
        self.ranks.check_others()


def write_report(out: Path, throughput: dict[str, dict]) -> None:
    """Write throughput by domain and stage into prepare.json, beside that of other domains."""
    path = out / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    for domain, stages in throughput.items():
        report[domain] = {**report.get(domain, {}), **stages}
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())


def digest(inputs: object) -> str:
    """Return 16 hex digits that change with `inputs`, a value that JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def remove_folders(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder)


def work_file(folder: Path, name: str) -> Path:
    """Return the path of a work file: one of 256 folders below `folder`, since network file systems are slow with a
    million files in one."""
    return folder / hashlib.sha1(name.encode()).hexdigest()[:2] / name


def write_work(file: Path, **arrays) -> None:
    """Write a .npz that appears whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        write_atomically(file, buffer.getvalue(), durable=False)
    except FileNotFoundError:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, buffer.getvalue(), durable=False)


def read_work(file: Path, *names: str) -> dict[str, np.ndarray]:
    """Return the arrays of a work file: those named, or all."""
    with zipfile.ZipFile(file) as stored:
        members = [f"{name}.npy" for name in names] or stored.namelist()
        return {member.removesuffix(".npy"): parse_npy(stored.read(member)) for member in members}


def list_work(folder: Path) -> set[str]:
    """Return the names of all work files of a folder: 256 listings instead of a look for each."""
    return {name for part in folder.iterdir() if part.is_dir() for name in os.listdir(part)}  # noqa: PTH208 - names alone


def read_record(record: Path, written: Path) -> dict[str, np.ndarray] | None:
    """Return the work file that describes a written tar, or None unless both exist and the tar has the size in it."""
    if not (record.is_file() and written.is_file()):
        return None
    stored = read_work(record)
    return stored if json.loads(str(stored["entry"]))["bytes"] == written.stat().st_size else None
