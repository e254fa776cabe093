"""`agrepa prepare … --add-teacher` and `--add-speaker`: the targets of one more teacher, or the vectors of speakers'
voices, in sidecars beside shards that stay as they are.

The recordings are given again and matched by key, since shards hold no waves. Every rank writes the sidecars of its
shards. An interrupted run goes on after the clips that are computed.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..config import Config, DataConfig
from ..corpora.recordings import Recording, Source
from ..data.index import Index, attention_layers
from ..data.samples import npy, pooled
from ..data.tars import read_descriptions
from ..data.writing import write_tar
from ..errors import UserError
from ..ranks import ALONE, Ranks
from ..teachers.campplus import CampPlus
from .decode import cut_wave
from .job import Job, read_record, read_work, work_file, write_work
from .out_folder import check_setting, finish, locked, read_existing
from .passes import BatchPass, batches_by_length, compute_each
from .pipeline import load_teacher_on_every_rank, reading_threads
from .targets import attention_shape, stored_target, target_name, teacher_entry, teacher_frames


def add_teacher(
    config: Config, list_sources: Callable[[], list[Source]], out: Path, spec: str, ranks: Ranks = ALONE
) -> Index:
    """Add the targets of the teacher `spec` to the domains of the sources in `out`, from the recordings that the shards
    were made of, at data.teacher_rate. Every rank must call it; rank 0 alone calls `list_sources`.

    Does nothing if `out` has them already. Raises UserError for other recordings or settings than those of the shards,
    and for a teacher whose name is that of other targets.
    """
    return _add(_NewTeacher(config.data, spec), config.data, list_sources, Path(out), ranks)


def add_speaker(
    config: Config, list_sources: Callable[[], list[Source]], out: Path, spec: str, ranks: Ranks = ALONE
) -> Index:
    """Add the speaker vectors of `spec`, campplus:FILE.onnx, as add_teacher adds targets. Once every domain in `out`
    has them, runs are to set data.speaker, as for shards that were prepared with it."""
    data = DataConfig(**vars(config.data) | {"speaker": spec})
    return _add(_NewSpeaker(spec), data, list_sources, Path(out), ranks)


def _add(
    new: "_NewTeacher | _NewSpeaker",
    data: DataConfig,
    list_sources: Callable[[], list[Source]],
    out: Path,
    ranks: Ranks,
) -> Index:
    sources = list_sources() if ranks.rank == 0 else []
    domains = ranks.from_rank_0(lambda: [source.domain for source in sources])
    content = ranks.from_rank_0(lambda: _read_prepared(data, out, sources, new))
    missing = [domain for domain in domains if not new.is_in(out, content["domains"][domain])]
    if not missing:
        if ranks.rank == 0:
            print(f"{out}: has {new.what}, nothing to do")
        return Index(out, content)
    with locked(out, ranks), reading_threads() as pool:
        # Another process may have written meanwhile.
        content = ranks.from_rank_0(lambda: _read_prepared(data, out, sources, new))
        new.load(ranks)
        throughput = {}
        for number, domain in enumerate(domains):
            if new.is_in(out, content["domains"][domain]):
                continue
            if other := content["domains"][domain]["teachers"].get(new.name):
                raise UserError(
                    f"{out} has targets of a teacher {other['spec']!r} that is called {new.name}, too: rename the "
                    f"folder of {new.spec!r}, and give its new name"
                )
            job = Job(data, out, domain, ranks, pool)
            recordings = ranks.from_rank_0(lambda number=number: sources[number].recordings())
            files, total = _SidecarStage(job, content, {r.name: r for r in recordings}, new).run()
            if ranks.rank == 0:
                new.enter(content, domain, files, total)
                throughput[domain] = job.throughput
        return ranks.from_rank_0(lambda: finish(out, content, throughput, "sidecars-*"))


def _read_prepared(data: DataConfig, out: Path, sources: list[Source], new: "_NewTeacher | _NewSpeaker") -> dict:
    """Return the content of an index. Raises UserError unless it has all the sources' domains."""
    content = read_existing(data, out, sources, targets=False, but=new.settings)
    for source in sources:
        if source.domain not in content["domains"]:
            raise UserError(f"{out} holds no {source.domain}: prepare it first, without {new.option}")
    return content


class _NewTeacher:
    """The targets of a teacher, as they are added to a domain."""

    option, settings = "--add-teacher", ()  # settings that the shards need not have been prepared with

    def __init__(self, data: DataConfig, spec: str):
        self.data, self.spec, self.what = data, spec, f"targets of {spec}"

    def is_in(self, out: Path, domain: dict) -> bool:
        """Return whether a domain has them. Raises UserError if it has those of another precision."""
        wanted = self.spec, self.data.teacher_rate, self.data.teacher_attention
        for entry in domain["teachers"].values():
            if (entry["spec"], entry["rate"], attention_layers(entry)) == wanted:
                precision = entry["identity"].get("precision")
                check_setting(out, "teacher_precision", precision, self.data.teacher_precision)
                return True
        return False

    def load(self, ranks: Ranks) -> None:
        self.encoder = load_teacher_on_every_rank(self.data, self.spec, ranks)
        self.name = target_name(self.encoder, self.data)
        attention_shape(self.encoder, self.data)  # refuses a teacher without one

    def compute(self, clips: list["_ShardClip"], waves: list[np.ndarray]) -> Iterable[np.ndarray | str]:
        """Return each clip's entry in a sidecar, or the reason why it has none."""
        of_clips = teacher_frames(self.encoder, waves, self.data.teacher_attention)
        for clip, frames in zip(clips, of_clips, strict=True):
            bad = isinstance(frames, str)
            yield frames if bad else stored_target(self.encoder, frames, clip.seconds, self.data.teacher_rate)

    def enter(self, content: dict, name: str, files: dict[str, dict], total: np.ndarray) -> None:
        """Write the entry of a domain into the index. total: the sum over its train clips."""
        domain = content["domains"][name]
        mean = total / domain["clips"]["train"]
        domain["teachers"][self.name] = teacher_entry(self.encoder, self.spec, self.data, mean, files)


class _NewSpeaker:
    """The vectors of speakers' voices, likewise."""

    option, settings, name = "--add-speaker", ("speaker",), "speaker"

    def __init__(self, spec: str):
        self.spec, self.what = spec, f"speaker vectors of {spec}"

    def is_in(self, out: Path, domain: dict) -> bool:
        return "speaker" in domain  # of the same file: read_existing compares it

    def load(self, ranks: Ranks) -> None:
        self.encoder = ranks.load_on_every_rank(self.spec, lambda _device: CampPlus(self.spec))

    def compute(self, clips: list["_ShardClip"], waves: list[np.ndarray]) -> Iterable[np.ndarray | str]:
        return compute_each(f"data.speaker={self.spec}", partial(map, self.encoder.vector), waves)

    def enter(self, content: dict, name: str, files: dict[str, dict], total: np.ndarray) -> None:
        identity = self.encoder.identity
        content["domains"][name]["speaker"] = {"dim": self.encoder.dim, "identity": identity, "files": files}
        if all("speaker" in domain for domain in content["domains"].values()):
            content["features"]["speaker"] = self.spec


@dataclass(frozen=True)
class _ShardClip:
    """A clip of a shard, and the recording that its wave comes from."""

    name: str  # the WebDataset key
    frames: int  # of its mel
    seconds: float
    recording: Recording


class _SidecarStage:
    """Writes the sidecars of one domain."""

    def __init__(self, job: Job, content: dict, recordings: dict[str, Recording], new: "_NewTeacher | _NewSpeaker"):
        self.job, self.recordings, self.new = job, recordings, new
        self.shards = [shard for shard in content["shards"] if shard["domain"] == job.domain]
        inputs = [new.name, new.encoder.identity, [(shard["file"], shard["sha256"]) for shard in self.shards]]
        self.folder = job.work_folder(f"sidecars-{new.name}", inputs, only=True)
        self.targets = BatchPass(job.pool, self.folder, self._read_waves, self._compute)

    def run(self) -> tuple[dict[str, dict], np.ndarray]:
        """Write this rank's sidecars. Returns, on rank 0, the facts of each shard's, and the sum of what the train
        clips have there, their frames averaged."""
        own = self.job.ranks.part_of(self.shards)
        missing = [shard for shard in own if read_record(self._record(shard), self._path(shard)) is None]
        clips_of = {shard["file"]: self._clips(shard) for shard in missing}
        with self.job.stage(f"adding {self.new.name}", sum(shard["clips"] for shard in own)) as stage:
            stage.skip(sum(shard["clips"] for shard in own) - sum(map(len, clips_of.values())))
            self.targets.run([batch for clips in clips_of.values() for batch in batches_by_length(clips)], stage)
            for shard in missing:
                self._write_sidecar(shard, clips_of[shard["file"]])
                self.job.ranks.check_others()
        if self.job.ranks.rank > 0:
            return {}, np.zeros(0)
        files, total = {}, np.zeros(self.new.encoder.dim)
        for shard in self.shards:
            stored = read_work(self._record(shard))
            files[shard["file"]] = json.loads(str(stored["entry"]))
            if shard["split"] == "train":
                total += stored["target"]
        return files, total

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
        rate = self.new.encoder.sample_rate
        wave = cut_wave(clip.recording, self.job.data, rate)
        seconds = len(wave) / rate
        if abs(seconds - clip.seconds) > 0.01 + 0.001 * clip.seconds:  # odd rates are resampled by a near ratio
            raise UserError(
                f"{clip.recording.source} has {seconds:.2f} s, clip {clip.name} of it {clip.seconds:.2f} s: give the "
                f"recordings that {self.job.out} was prepared from"
            )
        return wave

    def _compute(self, batch: list[_ShardClip], waves: list[np.ndarray]) -> Iterable[dict[str, np.ndarray]]:
        for clip, target in zip(batch, self.new.compute(batch, waves), strict=True):
            if isinstance(target, str):  # the clip is in the shards already, so that it cannot be left out
                raise UserError(
                    f"{clip.recording.source}: {target}: prepare the recordings again without it, or do without "
                    f"{self.new.option}"
                )
            yield {"target": target}

    def _write_sidecar(self, shard: dict, clips: list[_ShardClip]) -> None:
        targets = {clip.name: self.targets.result(clip)["target"] for clip in clips}
        path, suffix = self._path(shard), f"{self.new.name}.npy"
        written = write_tar(path, ({"__key__": key, suffix: npy(target)} for key, target in targets.items()))
        total = sum(pooled(target)[: self.new.encoder.dim].astype(np.float64) for target in targets.values())
        write_work(self._record(shard), entry=json.dumps({"file": path.name, **written}), target=total)

    def _path(self, shard: dict) -> Path:
        return self.job.out / f"{Path(shard['file']).stem}.{self.new.name}.tar"

    def _record(self, shard: dict) -> Path:
        return work_file(self.folder, f"{shard['file']}.npz")
