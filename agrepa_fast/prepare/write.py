"""The last stage of a preparation: write the clips into shards, and describe their domain for index.json.

Every rank writes its own shards, and beside each, in the work folder, its share of the domain's statistics. Rank 0 adds
those up in the shards' order, so that sums of floats do not depend on the ranks.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..audio.mel import frame_count
from ..config import DataConfig
from ..data.index import SPLITS
from ..data.samples import Sample, split_target
from ..data.writing import write_shard
from ..files import write_atomically
from ..tokenizers.base import tokens_of_frames
from ..tokenizers.code_mels import CodeMels, codebook_bytes
from ..tokenizers.kmeans import Codebook
from .decode import Clip
from .job import Job, Stage, read_record, read_work, work_file, write_work
from .passes import BatchPass, read_ahead
from .roles import TokenRole
from .targets import attention_shape, target_name, teacher_entry
from .teacher_pass import TeacherPass


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written."""

    file: str
    split: str
    bucket: int
    clips: list[Clip]


def plan_shards(data: DataConfig, domain: str, splits: dict[str, list[Clip]]) -> list[PlannedShard]:
    """Return the shards of a domain in their order: validation clips in one bucket, train clips by length bucket."""
    ends = [
        frame_count(round(seconds * data.sample_rate), data) for seconds in (*data.bucket_seconds, data.max_seconds)
    ]
    planned = []
    for split, clips in splits.items():
        buckets = {end: [] for end in (ends if split == "train" else ends[-1:])}
        for clip in clips:
            buckets[next(end for end in buckets if clip.frames <= end)].append(clip)
        parts = [
            (end, in_bucket[start : start + data.shard_clips])
            for end, in_bucket in buckets.items()
            for start in range(0, len(in_bucket), data.shard_clips)
        ]
        planned += [
            PlannedShard(f"{split}-{domain}-{number:04d}.tar", split, end, part)
            for number, (end, part) in enumerate(parts)
        ]
    return planned


class ShardStage:
    """Writes the shards of a domain whose teacher and token passes are done.

    descriptions: a digest of texts, labels, sources and licences. passes: by role, the passes of ids that the teacher's
    pass has not computed, and that of speaker vectors.
    """

    def __init__(
        self,
        job: Job,
        descriptions: str,
        splits: dict[str, list[Clip]],
        teacher: TeacherPass,
        codebook: Codebook | None,
        roles: list[TokenRole],
        passes: dict[str, BatchPass],
    ):
        self.job, self.data, self.domain = job, job.data, job.domain
        self.splits, self.teacher, self.codebook = splits, teacher, codebook
        self.roles, self.passes = {role.name: role for role in roles}, passes
        self.target = target_name(teacher.teacher, self.data)
        self.attention = attention_shape(teacher.teacher, self.data)
        self.planned = plan_shards(self.data, self.domain, splits)
        computed_by = [teacher.folder.name, *(tokens.folder.name for tokens in passes.values())]
        layout = [[shard.file, shard.bucket, len(shard.clips)] for shard in self.planned]
        self.folder = job.work_folder("shards", [descriptions, computed_by, layout], only=True)

    def run(self) -> tuple[dict, list[dict]]:
        """Write this rank's shards. Returns, on rank 0, the domain's entry in the index and those of its shards. Every
        rank must call it."""
        own = self.job.ranks.part_of(self.planned)
        with self.job.stage("shards", sum(len(shard.clips) for shard in own)) as stage:
            for shard in own:
                self._write(shard, stage)
        if self.job.ranks.rank > 0:
            return {}, []
        _remove_stale_shards(self.job.out, self.domain, {shard.file for shard in self.planned})
        return self._describe()

    def _write(self, shard: PlannedShard, stage: Stage) -> None:
        path, record = self.job.out / shard.file, self._record(shard)
        if read_record(record, path) is not None:
            stage.skip(len(shard.clips))
            return
        record.unlink(missing_ok=True)  # it describes a tar that is about to be overwritten
        sums, mels = _Sums(self.teacher.teacher.dim), CodeMels(self.data.codebook, self.data.n_mels)
        offset = self.roles["tokens"].offset

        def samples() -> Iterator[Sample]:
            for sample in read_ahead(self.job.pool, self._sample, shard.clips):
                sums.add(sample, shard.split == "train")
                if shard.split == "train":
                    mels.add(sample.tokens, sample.mel)
                sample.tokens += np.int32(offset)
                yield sample
                stage.add(sample.seconds)

        entry = write_shard(path, samples(), self.target)
        entry |= {"split": shard.split, "domain": self.domain, "bucket": shard.bucket}
        codes = mels.counts.nonzero()[0]
        of_codes = {"codes": codes, "code_sums": mels.sums[codes], "code_counts": mels.counts[codes]}
        write_work(record, entry=json.dumps(entry), **vars(sums), **of_codes)

    def _record(self, shard: PlannedShard) -> Path:
        return work_file(self.folder, f"{shard.file}.npz")

    def _sample(self, clip: Clip) -> Sample:
        """Return a clip as shards hold it, except that its ids still begin at 0."""
        recording = clip.recording
        stored = read_work(clip.file, "mel", "seconds", "cut")
        mel, seconds, cut = stored["mel"], round(float(stored["seconds"]), 4), bool(stored["cut"])
        computed = self.teacher.result(clip)
        for name, done in self.passes.items():
            computed[name] = done.result(clip)["speaker" if name == "speaker" else "ids"]
        tokens, extra = computed["tokens"], computed.get("tokens2")
        target, attention = split_target(computed["target"], self.teacher.teacher.dim, self.attention)
        return Sample(
            key=clip.name,
            frames=len(mel),
            seconds=seconds,
            cut=cut,
            mel=mel,
            tokens=tokens,
            tokens2=None if extra is None else tokens_of_frames(extra, len(tokens)),
            speaker=computed.get("speaker"),
            teacher=target,
            attention=attention,
            **{name: getattr(recording, name) for name in ("domain", "text", "labels", "source", "licence")},
        )

    def _describe(self) -> tuple[dict, list[dict]]:
        teacher, train = self.teacher.teacher, len(self.splits["train"])
        total, mels = _Sums(teacher.dim), CodeMels(self.data.codebook, self.data.n_mels)
        shards, seconds = [], dict.fromkeys(SPLITS, 0.0)
        for shard in self.planned:
            stored = read_work(self._record(shard))
            shards.append(json.loads(str(stored["entry"])))
            seconds[shard.split] += float(stored["seconds"])
            total.values += stored["values"]
            total.target += stored["target"]
            mels.sums[stored["codes"]] += stored["code_sums"]
            mels.counts[stored["codes"]] += stored["code_counts"]
        frames, values, squares = total.values.tolist()
        spec = getattr(self.data, f"{self.domain}_teacher")
        entry = {
            "clips": {split: len(clips) for split, clips in self.splits.items()},
            "seconds": {split: round(seconds[split], 3) for split in SPLITS},
            "mel": {"frames": int(frames), "sum": values, "sum_squares": squares},
            "tokens": self._write_codebook(mels),
            **{name: role.index_entry() for name, role in self.roles.items() if name != "tokens"},
            "teachers": {self.target: teacher_entry(teacher, spec, self.data, total.target / train, None)},
        }
        return entry, shards

    def _write_codebook(self, mels: CodeMels) -> dict:
        """Write codebook-<domain>.safetensors. Returns the entry of the domain's tokens in the index."""
        content = codebook_bytes(self.codebook, mels.means())
        file = self.job.out / f"codebook-{self.domain}.safetensors"
        write_atomically(file, content)
        written = {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return {**self.roles["tokens"].index_entry(), **written}


class _Sums:
    """The share of one shard in the statistics of its domain."""

    def __init__(self, dim: int):
        self.seconds = 0.0
        self.values = np.zeros(3)  # frames, sum and sum of squares of the train mels
        self.target = np.zeros(dim)  # sum of the train clips' pooled teacher vectors

    def add(self, sample: Sample, train: bool) -> None:
        self.seconds += sample.seconds
        if train:
            mel = sample.mel.astype(np.float64)
            self.values += len(mel), mel.sum(), (mel**2).sum()
            self.target += sample.pooled


def _remove_stale_shards(out: Path, domain: str, keep: set[str]) -> None:
    """Remove the shards, whole or half written, that an interrupted preparation with other settings has left."""
    pattern = re.compile(rf"\.?({'|'.join(SPLITS)})-{domain}-\d{{4,}}(\.\w+)?\.tar(\.\w+)?(\.part)?")
    for path in out.iterdir():
        if pattern.fullmatch(path.name) and path.name not in keep:
            path.unlink()
