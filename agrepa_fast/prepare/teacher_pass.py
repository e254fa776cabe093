"""Clips to tokens and teacher targets: one pass of the frozen teacher, and a codebook fitted on the way.

Tokenizers of other inputs have passes of their own: tokenizing.py."""

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..data.index import SPLITS
from ..errors import UserError
from ..tokenizers.kmeans import Codebook, FrameTokenizer, fit_frames
from .decode import Clip, ahead, cut_wave, digest
from .job import Job, Stage, work_file, work_names, write_work

BATCH = 16  # clips per call of the teacher


class TeacherStage:
    """Teacher frames of the clips -> for each clip its ids of every role, and what is stored of the teacher.

    `tokenizers`: by role; None is a codebook of k-means. It is fitted on the first train clips in hash order that have
    enough frames; only their frames are kept, since frames of a large corpus would need more room than the corpus.
    """

    def __init__(self, job: Job, teacher, splits: dict[str, list[Clip]], tokenizers: dict[str, FrameTokenizer | None]):
        self.job, self.data, self.domain, self.ranks = job, job.data, job.domain, job.ranks
        self.teacher, self.splits, self.tokenizers = teacher, splits, dict(tokenizers)
        every = [clip.file.name for split in SPLITS for clip in splits[split]]
        used = {role: tokenizer and tokenizer.identity for role, tokenizer in tokenizers.items()}
        depends = [teacher.name, teacher.identity, used, self.data.codebook, self.data.teacher_rate, every]
        self.folder = job.folder("teacher", digest(depends))

    def run(self) -> Codebook | None:
        """The codebook, where one was asked for."""
        fits = [role for role, tokenizer in self.tokenizers.items() if tokenizer is None]
        fit = self._fit_clips() if fits else []
        names = {clip.recording.name for clip in fit}
        rest = [clip for split in SPLITS for clip in self.splits[split] if clip.recording.name not in names]
        fit, rest = self._own_batches(fit), self._own_batches(rest)
        with self.job.stage("teacher", sum(map(len, fit + rest))) as stage:
            self._pass(fit, "frames", lambda clip, frames: {"frames": frames}, stage)
            self.ranks.all_gather(None)  # the frames are there, of all ranks
            codebook = self.ranks.from_rank_0(self._codebook) if fits else None
            self.tokenizers |= dict.fromkeys(fits, codebook)
            for clip in chain.from_iterable(fit):
                if not self._file(clip, "tokens").is_file():
                    with np.load(self._file(clip, "frames"), allow_pickle=False) as stored:
                        write_work(self._file(clip, "tokens"), **self._encoded(clip, stored["frames"]))
            self._pass(rest, "tokens", self._encoded, stage)
        return codebook

    def encoded(self, clip: Clip) -> dict[str, np.ndarray]:
        """By role (S,) int32 ids, from 0 on; `target` (dim,) fp16, or (frames, dim) with data.teacher_rate."""
        with np.load(self._file(clip, "tokens"), allow_pickle=False) as stored:
            return dict(stored)

    def _file(self, clip: Clip, kind: str) -> Path:
        return work_file(self.folder, f"{clip.file.stem}.{kind}.npz")

    def _fit_clips(self) -> list[Clip]:
        enough, frames, fit = fit_frames(self.data.codebook), 0.0, []
        seconds_per_mel = self.data.hop_length / self.data.sample_rate
        for clip in self.splits["train"]:
            if frames >= enough:
                break
            fit.append(clip)
            frames += clip.frames * seconds_per_mel * self.teacher.rate
        return fit

    def _codebook(self) -> Codebook:
        file = self.folder / "codebook.npz"
        if not file.is_file():
            frames = []
            for clip in self._fit_clips():
                with np.load(self._file(clip, "frames"), allow_pickle=False) as stored:
                    frames.append(stored["frames"])
            codebook = Codebook.fit(np.concatenate(frames), self.data.codebook, self.domain)
            write_work(file, centroids=codebook.centroids)
        with np.load(file, allow_pickle=False) as stored:
            return Codebook(stored["centroids"])

    def _own_batches(self, clips: list[Clip]) -> list[list[Clip]]:
        """This rank's batches, of like length. They are fixed by the clips alone, and repeated whole after an
        interruption, so that no clip's numbers depend on who computed it, and when."""
        return self.ranks.part_of(batches_of(clips, lambda clip: (clip.frames, clip.recording.name)))

    def _pass(self, batches: list[list[Clip]], kind: str, result: Callable[[Clip, np.ndarray], dict], stage: Stage):
        """Run the teacher and keep result(clip, frames fp16) of every clip."""
        there = work_names(self.folder)
        missing = [batch for batch in batches if any(self._file(clip, kind).name not in there for clip in batch)]
        stage.skip(sum(map(len, batches)) - sum(map(len, missing)))
        for batch, waves in zip(missing, ahead(self.job.pool, self._waves, missing, depth=2), strict=True):
            for clip, frames in zip(batch, self._frames(waves, batch), strict=True):
                write_work(self._file(clip, kind), **result(clip, frames))
                stage.done(clip.seconds)

    def _waves(self, batch: list[Clip]) -> list[np.ndarray]:
        return [cut_wave(clip.recording, self.data, self.teacher.sample_rate) for clip in batch]

    def _frames(self, waves: list[np.ndarray], batch: list[Clip]) -> list[np.ndarray]:
        return teacher_frames(self.teacher, waves, [clip.recording.source for clip in batch], self.domain)

    def _encoded(self, clip: Clip, frames: np.ndarray) -> dict:
        ids = {role: tokenizer.encode(frames) for role, tokenizer in self.tokenizers.items()}
        return {**ids, "target": target(frames, clip.seconds, self.data.teacher_rate)}


def batches_of(items: Iterable, order: Callable) -> list[list]:
    """Batches for the teacher, in this order."""
    items = sorted(items, key=order)
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def teacher_frames(teacher, waves: list[np.ndarray], names: list[str], domain: str) -> list[np.ndarray]:
    """The teacher's frames (frames, dim) fp16 of each wave. UserError, with its name, where there are none."""
    frames_of = [frames.astype(np.float16) for frames in teacher.frames(waves)]
    for name, frames in zip(names, frames_of, strict=True):
        if len(frames) == 0 or not np.isfinite(frames).all():
            raise UserError(
                f"{name}: teacher {teacher.name} gives {len(frames)} frames, or values that fp16 cannot hold: "
                f"remove the recording, or set another data.{domain}_teacher"
            )
    return frames_of


def target(frames: np.ndarray, seconds: float, rate: float | None) -> np.ndarray:
    """What is stored of a clip's teacher frames (S, dim): their mean (dim,), or with a rate in Hz as many means as the
    clip's seconds have, (max(1, round(seconds * rate)), dim); fp16."""
    if rate is None:
        return frames.mean(axis=0, dtype=np.float32).astype(np.float16)
    return resample_frames(frames, max(1, round(seconds * rate))).astype(np.float16)


def resample_frames(frames: np.ndarray, count: int) -> np.ndarray:
    """(S, dim) -> (count, dim) float32: both span the clip, and each result is the mean over its part of it (area
    interpolation, the frames taken as constant for their time). So the mean over time stays what it is."""
    sums = np.zeros((len(frames) + 1, frames.shape[1]))
    np.cumsum(frames, axis=0, dtype=np.float64, out=sums[1:])
    edges = np.arange(count + 1) * (len(frames) / count)
    whole = np.minimum(edges.astype(np.int64), len(frames) - 1)
    integral = sums[whole] + (edges - whole)[:, None] * frames[whole]
    return (np.diff(integral, axis=0) * (count / len(frames))).astype(np.float32)


def teacher_name(teacher, rate: float | None) -> str:
    """The name of its targets in file names: `whisper_base`, at 12.5 frames per second `whisper_base_12p5hz`."""
    return teacher.name if rate is None else f"{teacher.name}_{rate:g}hz".replace(".", "p")


def teacher_entry(teacher, spec: str, data: DataConfig, mean: np.ndarray, files: dict | None) -> dict:
    """What index.json says of a teacher."""
    entry = {"spec": spec, "dim": teacher.dim, "rate": data.teacher_rate, "identity": teacher.identity}
    return {**entry, "mean": mean.tolist(), "files": files}
