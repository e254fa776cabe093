"""`agrepa prepare … --add-teacher`: the targets of one more teacher, in sidecars beside shards that stay as they are.

The recordings are given again and matched by key, since shards hold no waves. Every rank writes the sidecars of its
shards. An interrupted run goes on after the clips that are computed.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config, DataConfig
from ..corpora.recordings import Recording, Source
from ..data.index import Index
from ..data.samples import npy, pooled
from ..data.tars import read_descriptions
from ..data.writing import write_tar
from ..errors import UserError
from ..ranks import ALONE, Ranks
from .decode import cut_wave
from .job import Job, read_record, read_work, work_file, write_work
from .out_folder import check_setting, finish, locked, read_existing
from .passes import BatchPass, batches_by_length
from .pipeline import load_teacher_on_every_rank, reading_threads
from .targets import stored_target, target_name, teacher_entry, teacher_frames


@dataclass(frozen=True)
class _ShardClip:
    """A clip of a shard, and the recording that its wave comes from."""

    name: str  # the WebDataset key
    frames: int  # of its mel
    seconds: float
    recording: Recording


def add_teacher(
    config: Config, list_sources: Callable[[], list[Source]], out: Path, spec: str, ranks: Ranks = ALONE
) -> Index:
    """Add the targets of the teacher `spec` to the domains of the sources in `out`, from the recordings that the shards
    were made of, at data.teacher_rate. Every rank must call it; rank 0 alone calls `list_sources`.

    Does nothing if `out` has them already. Raises UserError for other recordings or settings than those of the shards,
    and for a teacher whose name is that of other targets.
    """
    data, out = config.data, Path(out)
    sources = list_sources() if ranks.rank == 0 else []
    domains = ranks.from_rank_0(lambda: [source.domain for source in sources])
    content = ranks.from_rank_0(lambda: _read_prepared(data, out, sources, spec))
    if all(_has_targets(content["domains"][domain], spec, data.teacher_rate) for domain in domains):
        if ranks.rank == 0:
            print(f"{out}: has targets of {spec}, nothing to do")
        return Index(out, content)
    with locked(out, ranks), reading_threads() as pool:
        # Another process may have written meanwhile.
        content = ranks.from_rank_0(lambda: _read_prepared(data, out, sources, spec))
        throughput, teacher = {}, load_teacher_on_every_rank(data, spec, ranks)
        for number, domain in enumerate(domains):
            if _has_targets(content["domains"][domain], spec, data.teacher_rate):
                continue
            job = Job(data, out, domain, ranks, pool)
            recordings = ranks.from_rank_0(lambda number=number: sources[number].recordings())
            entry = _SidecarStage(job, content, {r.name: r for r in recordings}, teacher, spec).run()
            if ranks.rank == 0:
                content["domains"][domain]["teachers"][target_name(teacher, data.teacher_rate)] = entry
                throughput[domain] = job.throughput
        return ranks.from_rank_0(lambda: finish(out, content, throughput, "sidecars-*"))


def _read_prepared(data: DataConfig, out: Path, sources: list[Source], spec: str) -> dict:
    """Return the content of an index. Raises UserError unless it has all the sources' domains."""
    content = read_existing(data, out, sources, targets=False)
    for source in sources:
        if source.domain not in content["domains"]:
            raise UserError(f"{out} holds no {source.domain}: prepare it first, without --add-teacher")
        for entry in content["domains"][source.domain]["teachers"].values():
            if (entry["spec"], entry["rate"]) == (spec, data.teacher_rate):
                check_setting(out, "teacher_precision", entry["identity"].get("precision"), data.teacher_precision)
    return content


def _has_targets(domain: dict, spec: str, rate: float | None) -> bool:
    return any((entry["spec"], entry["rate"]) == (spec, rate) for entry in domain["teachers"].values())


class _SidecarStage:
    """Writes the sidecars of one domain."""

    def __init__(self, job: Job, content: dict, recordings: dict[str, Recording], teacher, spec: str):
        self.job, self.recordings, self.teacher, self.spec = job, recordings, teacher, spec
        self.target = target_name(teacher, job.data.teacher_rate)
        domain = content["domains"][job.domain]
        self.shards = [shard for shard in content["shards"] if shard["domain"] == job.domain]
        self.train_clips = domain["clips"]["train"]
        if other := domain["teachers"].get(self.target):
            raise UserError(
                f"{job.out} has targets of a teacher {other['spec']!r} that is called {self.target}, too: rename the "
                f"folder of {spec!r}, and give its new name"
            )
        inputs = [self.target, teacher.identity, [(shard["file"], shard["sha256"]) for shard in self.shards]]
        self.folder = job.work_folder(f"sidecars-{self.target}", inputs, only=True)
        self.targets = BatchPass(job.pool, self.folder, self._read_waves, self._compute)

    def run(self) -> dict:
        """Write this rank's sidecars. Returns, on rank 0, the teacher's entry in the index."""
        own = self.job.ranks.part_of(self.shards)
        missing = [shard for shard in own if read_record(self._record(shard), self._path(shard)) is None]
        clips_of = {shard["file"]: self._clips(shard) for shard in missing}
        with self.job.stage(f"teacher {self.target}", sum(shard["clips"] for shard in own)) as stage:
            stage.skip(sum(shard["clips"] for shard in own) - sum(map(len, clips_of.values())))
            self.targets.run([batch for clips in clips_of.values() for batch in batches_by_length(clips)], stage)
            for shard in missing:
                self._write_sidecar(shard, clips_of[shard["file"]])
                self.job.ranks.check_others()
        if self.job.ranks.rank > 0:
            return {}
        files, total = {}, np.zeros(self.teacher.dim)
        for shard in self.shards:
            stored = read_work(self._record(shard))
            files[shard["file"]] = json.loads(str(stored["entry"]))
            if shard["split"] == "train":
                total += stored["target"]
        return teacher_entry(self.teacher, self.spec, self.job.data, total / self.train_clips, files)

    def _clips(self, shard: dict) -> list[_ShardClip]:
        clips = []
        for key, description in read_descriptions(self.job.out / shard["file"]):
            if key not in self.recordings:
                raise UserError(
                    f"{shard['file']}: clip {key} ({description['source']}) is not among the recordings: give those "
                    f"that {self.job.out} was prepared from"
                )
            clips.append(_ShardClip(key, description["frames"], description["seconds"], self.recordings[key]))
        return clips

    def _read_waves(self, batch: list[_ShardClip]) -> list[np.ndarray]:
        return [self._wave(clip) for clip in batch]

    def _wave(self, clip: _ShardClip) -> np.ndarray:
        wave = cut_wave(clip.recording, self.job.data, self.teacher.sample_rate)
        seconds = len(wave) / self.teacher.sample_rate
        if abs(seconds - clip.seconds) > 0.01 + 0.001 * clip.seconds:  # odd rates are resampled by a near ratio
            raise UserError(
                f"{clip.recording.source} has {seconds:.2f} s, clip {clip.name} of it {clip.seconds:.2f} s: give the "
                f"recordings that {self.job.out} was prepared from"
            )
        return wave

    def _compute(self, batch: list[_ShardClip], waves: list[np.ndarray]) -> Iterable[dict[str, np.ndarray]]:
        for clip, frames in zip(batch, teacher_frames(self.teacher, waves), strict=True):
            if isinstance(frames, str):  # the clip is in the shards already, so that it cannot be left out
                raise UserError(
                    f"{clip.recording.source}: {frames}: add another teacher, or prepare the "
                    "recordings again without it"
                )
            yield {"target": stored_target(frames, clip.seconds, self.job.data.teacher_rate)}

    def _write_sidecar(self, shard: dict, clips: list[_ShardClip]) -> None:
        targets = {clip.name: self.targets.result(clip)["target"] for clip in clips}
        path, suffix = self._path(shard), f"{self.target}.npy"
        written = write_tar(path, ({"__key__": key, suffix: npy(target)} for key, target in targets.items()))
        total = sum(pooled(target).astype(np.float64) for target in targets.values())
        write_work(self._record(shard), entry=json.dumps({"file": path.name, **written}), target=total)

    def _path(self, shard: dict) -> Path:
        return self.job.out / f"{Path(shard['file']).stem}.{self.target}.tar"

    def _record(self, shard: dict) -> Path:
        return work_file(self.folder, f"{shard['file']}.npz")
