"""`agrepa prepare … --add-teacher`: the targets of one more teacher, in sidecars beside shards that stay as they are.

The recordings are given again and matched by key, since shards hold no waves. Every rank writes the sidecars of its
shards; an interrupted run goes on after those that are complete.
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config, DataConfig
from ..corpora.recordings import Recording, Source
from ..data.index import Index, remedy
from ..data.samples import npy, pooled
from ..data.writing import write_tar
from ..errors import UserError
from ..ranks import ALONE, Ranks
from .decode import ahead, cut_wave, digest
from .job import Job, Stage, work_file, write_work
from .pipeline import existing, finish, load_on_all, only_writer, same_setting, workers
from .teacher_pass import batches_of, target, teacher_entry, teacher_frames, teacher_name


@dataclass(frozen=True)
class _Clip:
    """A clip of a shard, and where its wave comes from."""

    key: str
    frames: int
    seconds: float
    recording: Recording


def add_teacher(
    config: Config, listing: Callable[[], list[Source]], out: Path, spec: str, ranks: Ranks = ALONE
) -> Index:
    """Add the teacher that `spec` names to the domains of the sources in `out`, from the recordings that the shards
    were made of; data.teacher_rate says what is stored. Rank 0 alone calls `listing`.

    Does nothing where it has been done. Raises UserError for other recordings or settings than those of the shards, and
    a teacher that shares its name with another one's targets.
    """
    data, out = config.data, Path(out)
    sources = listing() if ranks.rank == 0 else []
    domains = ranks.from_rank_0(lambda: [source.domain for source in sources])
    content = ranks.from_rank_0(lambda: _prepared(data, out, sources, spec))
    if all(_is_there(content["domains"][domain], spec, data.teacher_rate) for domain in domains):
        if ranks.rank == 0:
            print(f"{out}: has targets of {spec}, nothing to do")
        return Index(out, content)
    with only_writer(out, ranks), workers() as pool:
        # Another process may have written meanwhile.
        content = ranks.from_rank_0(lambda: _prepared(data, out, sources, spec))
        throughput, teacher = {}, load_on_all(data, spec, ranks)
        for number, domain in enumerate(domains):
            if _is_there(content["domains"][domain], spec, data.teacher_rate):
                continue
            job = Job(data, out, domain, ranks, pool)
            recordings = ranks.from_rank_0(lambda number=number: sources[number].recordings())
            entry = _SidecarStage(job, content, {r.name: r for r in recordings}, teacher, spec).run()
            if ranks.rank == 0:
                content["domains"][domain]["teachers"][teacher_name(teacher, data.teacher_rate)] = entry
                throughput[domain] = job.throughput
        return ranks.from_rank_0(lambda: finish(out, content, throughput, "sidecars-*"))


def _prepared(data: DataConfig, out: Path, sources: list[Source], spec: str) -> dict:
    """The content of an index that has all the sources' domains."""
    content = existing(data, out, sources, teachers=False)
    for source in sources:
        if source.domain not in content["domains"]:
            raise UserError(f"{out} holds no {source.domain}: prepare it first, without --add-teacher")
        for entry in content["domains"][source.domain]["teachers"].values():
            if (entry["spec"], entry["rate"]) == (spec, data.teacher_rate):
                same_setting(out, "teacher_precision", entry["identity"].get("precision"), data.teacher_precision)
    return content


def _is_there(domain: dict, spec: str, rate: float | None) -> bool:
    return any((entry["spec"], entry["rate"]) == (spec, rate) for entry in domain["teachers"].values())


class _SidecarStage:
    """Writes the sidecars of one domain."""

    def __init__(self, job: Job, content: dict, recordings: dict[str, Recording], teacher, spec: str):
        self.job, self.recordings, self.teacher, self.spec = job, recordings, teacher, spec
        self.name = teacher_name(teacher, job.data.teacher_rate)
        domain = content["domains"][job.domain]
        self.shards = [shard for shard in content["shards"] if shard["domain"] == job.domain]
        self.train_clips = domain["clips"]["train"]
        if other := domain["teachers"].get(self.name):
            raise UserError(
                f"{job.out} has targets of a teacher {other['spec']!r} that is called {self.name}, too: rename the "
                f"folder of {spec!r}, and give its new name"
            )
        depends = [self.name, teacher.identity, [(shard["file"], shard["sha256"]) for shard in self.shards]]
        self.folder = job.folder(f"sidecars-{self.name}", digest(depends), alone=True)

    def run(self) -> dict:
        """On rank 0 what index.json says of the teacher; elsewhere nothing."""
        own = self.job.ranks.part_of(self.shards)
        with self.job.stage(f"teacher {self.name}", sum(shard["clips"] for shard in own)) as stage:
            self._write([shard for shard in own if not self._is_complete(shard, stage)], stage)
        if self.job.ranks.rank > 0:
            return {}
        files, total = {}, np.zeros(self.teacher.dim)
        for shard in self.shards:
            with np.load(self._record(shard), allow_pickle=False) as stored:
                files[shard["file"]] = json.loads(str(stored["entry"]))
                if shard["split"] == "train":
                    total += stored["target"]
        return teacher_entry(self.teacher, self.spec, self.job.data, total / self.train_clips, files)

    def _is_complete(self, shard: dict, stage: Stage) -> bool:
        record, path = self._record(shard), self._path(shard)
        if not (record.is_file() and path.is_file()):
            return False
        with np.load(record, allow_pickle=False) as stored:
            complete = json.loads(str(stored["entry"]))["bytes"] == path.stat().st_size
        if complete:
            stage.skip(shard["clips"])
        return complete

    def _write(self, shards: list[dict], stage: Stage) -> None:
        """Batches of all shards in one queue, so that the next shard's waves are read while the teacher runs."""
        batches = ((shard, clips, batch) for shard in shards for clips, batch in self._batches(shard))
        found: dict[str, np.ndarray] = {}
        for (shard, clips, batch), waves in ahead(self.job.pool, self._with_waves, batches, depth=2):
            names = [clip.recording.source for clip in batch]
            for clip, frames in zip(batch, teacher_frames(self.teacher, waves, names, self.job.domain), strict=True):
                found[clip.key] = target(frames, clip.seconds, self.job.data.teacher_rate)
                stage.done(clip.seconds)
            if len(found) == len(clips):
                self._write_sidecar(shard, [(clip.key, found[clip.key]) for clip in clips])
                found = {}

    def _batches(self, shard: dict) -> Iterator[tuple[list[_Clip], list[_Clip]]]:
        """All clips of a shard, with each batch of them."""
        clips = [self._clip(shard, key, meta) for key, meta in _descriptions(self.job.out / shard["file"])]
        for batch in batches_of(clips, lambda clip: (clip.frames, clip.key)):
            yield clips, batch

    def _clip(self, shard: dict, key: str, meta: dict) -> _Clip:
        if key not in self.recordings:
            raise UserError(
                f"{shard['file']}: clip {key} ({meta['source']}) is not among the recordings: give those that "
                f"{self.job.out} was prepared from"
            )
        return _Clip(key, meta["frames"], meta["seconds"], self.recordings[key])

    def _with_waves(self, item: tuple) -> tuple[tuple, list[np.ndarray]]:
        return item, [self._wave(clip) for clip in item[2]]

    def _wave(self, clip: _Clip) -> np.ndarray:
        wave = cut_wave(clip.recording, self.job.data, self.teacher.sample_rate)
        seconds = len(wave) / self.teacher.sample_rate
        if abs(seconds - clip.seconds) > 0.01 + 0.001 * clip.seconds:  # odd rates are resampled by a near ratio
            raise UserError(
                f"{clip.recording.source} has {seconds:.2f} s, clip {clip.key} of it {clip.seconds:.2f} s: give the "
                f"recordings that {self.job.out} was prepared from"
            )
        return wave

    def _write_sidecar(self, shard: dict, targets: list[tuple[str, np.ndarray]]) -> None:
        path = self._path(shard)
        written = write_tar(path, ({"__key__": key, f"{self.name}.npy": npy(values)} for key, values in targets))
        total = sum(pooled(values).astype(np.float64) for _, values in targets)
        write_work(self._record(shard), entry=json.dumps({"file": path.name, **written}), target=total)

    def _path(self, shard: dict) -> Path:
        return self.job.out / f"{Path(shard['file']).stem}.{self.name}.tar"

    def _record(self, shard: dict) -> Path:
        return work_file(self.folder, f"{shard['file']}.npz")


def _descriptions(path: Path) -> list[tuple[str, dict]]:
    """Key and json of every clip of a shard, in its order; arrays are passed over."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [
                (member.name.removesuffix(".json"), json.load(tar.extractfile(member)))
                for member in tar
                if member.name.endswith(".json")
            ]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy(path.parent)}") from error
