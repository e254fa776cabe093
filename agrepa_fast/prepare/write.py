"""The last stage of a preparation: prepared clips to shards, and to what index.json says of their domain.

Every rank writes its own shards, and beside each, in the work folder, what it adds to the statistics. Rank 0 adds those
up in the shards' order: sums of floats that do not depend on who wrote what.
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
from ..data.samples import Sample
from ..data.writing import write_shard
from ..files import write_atomically
from ..tokenizers.kmeans import Codebook, CodeMels, codebook_bytes
from .decode import Clip, ahead, digest
from .job import Job, Stage, work_file, write_work
from .teacher_pass import TeacherStage, teacher_entry, teacher_name
from .token_pass import Role, TokenStage, paired


@dataclass(frozen=True)
class Planned:
    """A shard to be written."""

    file: str
    split: str
    bucket: int
    clips: list[Clip]


def plan_shards(data: DataConfig, domain: str, splits: dict[str, list[Clip]]) -> list[Planned]:
    """The shards of a domain in their order: validation clips as they come, train clips by length bucket."""
    ends = [
        frame_count(round(seconds * data.sample_rate), data) for seconds in (*data.bucket_seconds, data.max_seconds)
    ]
    planned = []
    for split, clips in splits.items():
        buckets = {end: [] for end in (ends if split == "train" else ends[-1:])}
        for clip in clips:
            buckets[next(end for end in buckets if clip.frames <= end)].append(clip)
        parts = [
            (end, inside[start : start + data.shard_clips])
            for end, inside in buckets.items()
            for start in range(0, len(inside), data.shard_clips)
        ]
        planned += [Planned(f"{split}-{domain}-{n:04d}.tar", split, end, part) for n, (end, part) in enumerate(parts)]
    return planned


class ShardStage:
    """Writes the shards of a domain whose clips have been encoded."""

    def __init__(
        self,
        job: Job,
        identity: str,
        splits: dict[str, list[Clip]],
        teacher: TeacherStage,
        codebook: Codebook | None,
        roles: list[Role],
        passes: dict[str, TokenStage],  # by role, where not the teacher's pass made its ids
    ):
        self.job, self.data, self.domain = job, job.data, job.domain
        self.splits, self.teacher, self.codebook = splits, teacher, codebook
        self.roles, self.passes = {role.name: role for role in roles}, passes
        self.name = teacher_name(teacher.teacher, self.data.teacher_rate)
        self.planned = plan_shards(self.data, self.domain, splits)
        # Of what the teacher's folder does not know: texts and labels, and how clips are spread over shards.
        made_by = [teacher.folder.name, *(stage.folder.name for stage in self.passes.values())]
        depends = [identity, made_by, [[p.file, p.bucket, len(p.clips)] for p in self.planned]]
        self.folder = job.folder("shards", digest(depends), alone=True)

    def run(self) -> tuple[dict, list[dict]]:
        """On rank 0 the domain's entry in the index, and its shards'; elsewhere nothing."""
        own = self.job.ranks.part_of(self.planned)
        with self.job.stage("shards", sum(len(planned.clips) for planned in own)) as stage:
            for planned in own:
                self._write(planned, stage)
        if self.job.ranks.rank > 0:
            return {}, []
        _remove_stale(self.job.out, self.domain, {planned.file for planned in self.planned})
        return self._merge()

    def _write(self, planned: Planned, stage: Stage) -> None:
        path, record = self.job.out / planned.file, self._record(planned)
        if record.is_file() and path.is_file():
            with np.load(record, allow_pickle=False) as stored:
                if json.loads(str(stored["entry"]))["bytes"] == path.stat().st_size:
                    stage.skip(len(planned.clips))
                    return
        record.unlink(missing_ok=True)  # of a shard that is about to be another one
        sums, mels = _Sums(self.teacher.teacher.dim), CodeMels(self.data.codebook, self.data.n_mels)
        offset = self.roles["tokens"].offset

        def samples() -> Iterator[Sample]:
            for sample in ahead(self.job.pool, self._sample, planned.clips):
                sums.add(sample, planned.split == "train")
                if planned.split == "train":
                    mels.add(sample.tokens, sample.mel)
                sample.tokens += np.int32(offset)
                yield sample
                stage.done(sample.seconds)

        entry = write_shard(path, samples(), self.name)
        entry |= {"split": planned.split, "domain": self.domain, "bucket": planned.bucket}
        codes = mels.counts.nonzero()[0]
        counted = {"codes": codes, "code_sums": mels.sums[codes], "code_counts": mels.counts[codes]}
        write_work(record, entry=json.dumps(entry), **vars(sums), **counted)

    def _record(self, planned: Planned) -> Path:
        return work_file(self.folder, f"{planned.file}.npz")

    def _sample(self, clip: Clip) -> Sample:
        """A clip as it is stored, but for its ids, which are still those of the codebook."""
        recording = clip.recording
        with np.load(clip.file, allow_pickle=False) as stored:
            mel, seconds, cut = stored["mel"], round(float(stored["seconds"]), 4), bool(stored["cut"])
        made = self.teacher.encoded(clip) | {name: stage.ids(clip) for name, stage in self.passes.items()}
        tokens = made["tokens"]
        extra = paired(tokens, made["tokens2"]) if "tokens2" in made else None
        described = {name: getattr(recording, name) for name in ("domain", "text", "labels", "source", "licence")}
        length = {"frames": len(mel), "seconds": seconds, "cut": cut}
        arrays = {"mel": mel, "tokens": tokens, "tokens2": extra, "teacher": made["target"]}
        return Sample(key=recording.name, **arrays, **length, **described)

    def _merge(self) -> tuple[dict, list[dict]]:
        teacher, train = self.teacher.teacher, len(self.splits["train"])
        total, mels = _Sums(teacher.dim), CodeMels(self.data.codebook, self.data.n_mels)
        shards, seconds = [], dict.fromkeys(SPLITS, 0.0)
        for planned in self.planned:
            with np.load(self._record(planned), allow_pickle=False) as stored:
                shards.append(json.loads(str(stored["entry"])))
                seconds[planned.split] += float(stored["seconds"])
                for name in ("values", "target"):
                    vars(total)[name] += stored[name]
                mels.sums[stored["codes"]] += stored["code_sums"]
                mels.counts[stored["codes"]] += stored["code_counts"]
        frames, values, squares = total.values.tolist()
        entry = {
            "clips": {split: len(clips) for split, clips in self.splits.items()},
            "seconds": {split: round(seconds[split], 3) for split in SPLITS},
            "mel": {"frames": int(frames), "sum": values, "sum_squares": squares},
            "tokens": self._write_codebook(mels),
            **{name: role.entry() for name, role in self.roles.items() if name != "tokens"},
            "teachers": {
                self.name: teacher_entry(
                    teacher, getattr(self.data, f"{self.domain}_teacher"), self.data, total.target / train, None
                )
            },
        }
        return entry, shards

    def _write_codebook(self, mels: CodeMels) -> dict:
        """Write codebook-<domain>.safetensors; the entry of its tokens in the index."""
        content = codebook_bytes(self.codebook, mels.means())
        file = self.job.out / f"codebook-{self.domain}.safetensors"
        write_atomically(file, content)
        written = {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return {**self.roles["tokens"].entry(), **written}


class _Sums:
    """What one shard adds to the statistics of its domain."""

    def __init__(self, dim: int) -> None:
        self.seconds = 0.0
        self.values = np.zeros(3)  # frames, sum and sum of squares of the train mels
        self.target = np.zeros(dim)  # of the train clips' pooled teacher vectors

    def add(self, sample: Sample, train: bool) -> None:
        self.seconds += sample.seconds
        if train:
            mel = sample.mel.astype(np.float64)
            self.values += len(mel), mel.sum(), (mel**2).sum()
            self.target += sample.pooled


def _remove_stale(out: Path, domain: str, keep: set[str]) -> None:
    """Shards that an interrupted run with other settings left, and what it left half written: no index names them."""
    pattern = re.compile(rf"\.?({'|'.join(SPLITS)})-{domain}-\d{{4,}}(\.\w+)?\.tar(\.\w+)?(\.part)?")
    for path in out.iterdir():
        if pattern.fullmatch(path.name) and path.name not in keep:
            path.unlink()
