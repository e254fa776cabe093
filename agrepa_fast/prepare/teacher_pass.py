"""The pass of a domain's own teacher: targets, the tokens that are read off its frames, and the codebook for them."""

from collections.abc import Iterable

import numpy as np

from ..data.index import SPLITS
from ..errors import UserError
from ..ranks import Ranks
from ..tokenizers.kmeans import Codebook, FrameTokenizer, fit_frames
from .decode import Clip, decoded_from
from .job import Job, read_work, write_work
from .passes import REASON, BatchPass, batches_by_length
from .targets import frame_tokens, stored_target, teacher_frames


class TeacherPass:
    """Runs a teacher over all clips of a domain. result(clip) is (S,) int32 ids from 0 on by role, and `target`.

    tokenizers: by role; None is a k-means codebook, fitted on the first train clips, in hash order, that have enough
    frames. Only their frames are kept, since those of a large corpus would need more room than the corpus.
    """

    def __init__(self, job: Job, teacher, splits: dict[str, list[Clip]], tokenizers: dict[str, FrameTokenizer | None]):
        self.job, self.data, self.teacher = job, job.data, teacher
        self.splits, self.tokenizers = splits, dict(tokenizers)
        used = {role: tokenizer and tokenizer.identity for role, tokenizer in tokenizers.items()}
        decoded = decoded_from((clip for split in SPLITS for clip in splits[split]), self.data)
        stored = [self.data.teacher_rate, self.data.teacher_attention]
        inputs = [teacher.name, teacher.identity, used, self.data.codebook, *stored, decoded]
        self.folder = job.work_folder("teacher", inputs)
        self._frames = BatchPass(job.pool, job.work_folder("frames", inputs), self._read_waves, self._keep_frames)
        self._of_frames = BatchPass(job.pool, self.folder, self._read_frames, self._encode)
        self._of_waves = BatchPass(job.pool, self.folder, self._read_waves, self._run_and_encode)
        self.result = self._of_waves.result

    def run(self) -> Codebook | None:
        """Compute the results of all clips. Returns the codebook, if a role asks for one. Every rank must call it."""
        fitted = [role for role, tokenizer in self.tokenizers.items() if tokenizer is None]
        fit = self._fit_clips() if fitted else []
        names = {clip.name for clip in fit}
        rest = [clip for split in SPLITS for clip in self.splits[split] if clip.name not in names]
        fit, rest = (self.job.ranks.part_of(batches_by_length(clips)) for clips in (fit, rest))
        codebook = None
        with self.job.stage("teacher", sum(map(len, [*fit, *rest]))) as stage:
            if fitted:
                self._frames.run(fit, stage)
                self.job.ranks.all_gather(None)  # the frames of all ranks are in their files
                codebook = self.job.ranks.from_rank_0(self._fit_codebook)
                self.tokenizers |= dict.fromkeys(fitted, codebook)
                for _ in self._of_frames.each(fit):
                    self.job.ranks.check_others()
            self._of_waves.run(rest, stage)
        return codebook

    def gather_unusable(self, ranks: Ranks) -> dict[str, str]:
        """Return the reasons of the clips that cannot be used. Every rank must call it."""
        return self._of_frames.gather_unusable(ranks) | self._of_waves.gather_unusable(ranks)

    def _fit_clips(self) -> list[Clip]:
        enough, frames, fit = fit_frames(self.data.codebook), 0.0, []
        seconds_per_mel = self.data.hop_length / self.data.sample_rate
        for clip in self.splits["train"]:
            if frames >= enough:
                break
            fit.append(clip)
            frames += clip.frames * seconds_per_mel * self.teacher.rate
        return fit

    def _fit_codebook(self) -> Codebook:
        file = self.folder / "codebook.npz"
        if not file.is_file():
            of_clips = self._read_frames(self._fit_clips())
            usable = [frames for frames in of_clips if not isinstance(frames, str)]
            if not usable:
                raise UserError(
                    f"{of_clips[0]}, for all of the first {len(of_clips)} {self.job.domain} clips: set another "
                    f"data.{self.job.domain}_teacher"
                )
            states = np.concatenate([frames[:, : self.teacher.dim] for frames in usable])
            codebook = Codebook.fit(states, self.data.codebook, self.job.domain)
            write_work(file, centroids=codebook.centroids)
        return Codebook(read_work(file)["centroids"])

    def _read_waves(self, batch: list[Clip]) -> list[np.ndarray]:
        return [clip.wave(self.teacher.sample_rate) for clip in batch]

    def _read_frames(self, batch: list[Clip]) -> list[np.ndarray | str]:
        """Return the frames of every clip, or the reason why it has none."""
        results = [self._frames.result(clip) for clip in batch]
        return [str(result[REASON]) if REASON in result else result["frames"] for result in results]

    def _keep_frames(self, batch: list[Clip], waves: list[np.ndarray]) -> Iterable[dict[str, np.ndarray]]:
        of_clips = teacher_frames(self.teacher, waves, self.data.teacher_attention)
        return ({REASON if isinstance(frames, str) else "frames": frames} for frames in of_clips)

    def _run_and_encode(self, batch: list[Clip], waves: list[np.ndarray]) -> Iterable[dict[str, np.ndarray]]:
        return self._encode(batch, teacher_frames(self.teacher, waves, self.data.teacher_attention))

    def _encode(self, batch: list[Clip], of_clips: list[np.ndarray | str]) -> Iterable[dict[str, np.ndarray]]:
        for clip, frames in zip(batch, of_clips, strict=True):
            if isinstance(frames, str):
                yield {REASON: frames}
                continue
            states = frames[:, : self.teacher.dim]
            ids = {
                role: frame_tokens(self.teacher, tokenizer, states, clip.seconds)
                for role, tokenizer in self.tokenizers.items()
            }
            yield {**ids, "target": stored_target(self.teacher, frames, clip.seconds, self.data.teacher_rate)}
