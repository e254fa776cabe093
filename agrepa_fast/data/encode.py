"""Clips to tokens and pooled teacher vectors: one pass of the frozen teacher, and a codebook fitted on the way."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import DataConfig, UserError
from .clips import Clip, ahead, cut_wave, digest, npz
from .shards import SPLITS, write_atomically
from .tokens import Codebook, fit_frames

_BATCH = 16  # clips per call of the teacher


class TeacherStage:
    """Teacher frames of the clips -> a codebook, and for each clip its tokens and pooled vector.

    The codebook is fitted on the first train clips in hash order that have enough frames; only their frames are kept,
    since frames of a large corpus would need more room than the corpus.
    """

    def __init__(self, data: DataConfig, work: Path, domain: str, teacher, splits: dict, pool: ThreadPoolExecutor):
        self.data, self.domain, self.teacher, self.splits, self.pool = data, domain, teacher, splits, pool
        every = [clip.file.name for split in SPLITS for clip in splits[split]]
        self.folder = work / f"{domain}-teacher-{digest([teacher.name, teacher.identity, data.codebook, every])}"
        self.folder.mkdir(exist_ok=True)

    def run(self) -> Codebook:
        fit = self._fit_clips()
        rest = [clip for split in SPLITS for clip in self.splits[split] if clip not in set(fit)]
        with tqdm(total=len(fit) + len(rest), desc=f"{self.domain}: teacher", unit="clip") as bar:
            self._pass(fit, "frames", lambda frames: {"frames": frames}, bar)
            codebook = self._codebook(fit)
            for clip in fit:
                file = self._file(clip, "tokens")
                if not file.is_file():
                    with np.load(self._file(clip, "frames"), allow_pickle=False) as stored:
                        write_atomically(file, npz(**_encoded(codebook, stored["frames"])))
            self._pass(rest, "tokens", partial(_encoded, codebook), bar)
        return codebook

    def tokens_and_pooled(self, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
        """(S,) int32 ids of the codebook, (dim,) fp16."""
        with np.load(self._file(clip, "tokens"), allow_pickle=False) as stored:
            return stored["tokens"], stored["pooled"]

    def _file(self, clip: Clip, kind: str) -> Path:
        return self.folder / f"{clip.file.stem}.{kind}.npz"

    def _fit_clips(self) -> list[Clip]:
        enough, frames, fit = fit_frames(self.data.codebook), 0.0, []
        seconds_per_mel = self.data.hop_length / self.data.sample_rate
        for clip in self.splits["train"]:
            if frames >= enough:
                break
            fit.append(clip)
            frames += clip.frames * seconds_per_mel * self.teacher.rate
        return fit

    def _codebook(self, fit: list[Clip]) -> Codebook:
        file = self.folder / "codebook.npz"
        if not file.is_file():
            frames = []
            for clip in fit:
                with np.load(self._file(clip, "frames"), allow_pickle=False) as stored:
                    frames.append(stored["frames"])
            codebook = Codebook.fit(np.concatenate(frames), self.data.codebook, self.domain)
            write_atomically(file, npz(centroids=codebook.centroids))
        with np.load(file, allow_pickle=False) as stored:
            return Codebook(stored["centroids"])

    def _pass(self, clips: list[Clip], kind: str, result: Callable[[np.ndarray], dict], bar: tqdm) -> None:
        """Run the teacher and keep result(frames fp16) of every clip."""
        # Batches of like length, fixed by the clips alone: an interrupted run repeats whole batches, so that no
        # clip's numbers depend on where it was interrupted.
        clips = sorted(clips, key=lambda clip: (clip.frames, clip.recording.name))
        batches = [clips[start : start + _BATCH] for start in range(0, len(clips), _BATCH)]
        missing = [batch for batch in batches if not all(self._file(clip, kind).is_file() for clip in batch)]
        bar.update(len(clips) - sum(map(len, missing)))
        for batch, waves in zip(missing, ahead(self.pool, self._waves, missing, depth=2), strict=True):
            for clip, frames in zip(batch, self.teacher.frames(waves), strict=True):
                frames = frames.astype(np.float16)
                if len(frames) == 0 or not np.isfinite(frames).all():
                    raise UserError(
                        f"{clip.recording.source}: teacher {self.teacher.name} gives {len(frames)} frames, or values "
                        f"that fp16 cannot hold: remove the recording, or set another data.{self.domain}_teacher"
                    )
                write_atomically(self._file(clip, kind), npz(**result(frames)))
            bar.update(len(batch))

    def _waves(self, batch: list[Clip]) -> list[np.ndarray]:
        return [cut_wave(clip.recording, self.data, self.teacher.sample_rate) for clip in batch]


def _encoded(codebook: Codebook, frames: np.ndarray) -> dict:
    pooled = frames.mean(axis=0, dtype=np.float32).astype(np.float16)
    return {"tokens": codebook.encode(frames), "pooled": pooled}
