"""The pass of a tokenizer that the teacher's pass does not run: of waves, or of another teacher's frames."""

from collections.abc import Iterable

import numpy as np

from ..data.index import SPLITS
from .decode import Clip, decoded_from
from .job import Job
from .passes import REASON, BatchPass, batches_by_length, compute_each
from .roles import TokenRole
from .targets import frame_tokens, teacher_frames


def run_token_pass(job: Job, role: TokenRole, splits: dict[str, list[Clip]]) -> BatchPass:
    """Compute the ids of a role for all clips. Returns the pass, whose result(clip)["ids"] is (S,) int32, S > 0. Every
    rank must call it."""

    def read(batch: list[Clip]) -> list[np.ndarray]:
        return [clip.wave(role.sample_rate) for clip in batch]

    def encode(spoken: list[tuple[np.ndarray, str]]) -> list[np.ndarray | str]:
        waves, texts = zip(*spoken, strict=True)
        return role.tokenizer.encode(list(waves), list(texts))

    def compute(batch: list[Clip], waves: list[np.ndarray]) -> Iterable[dict[str, np.ndarray]]:
        if role.teacher is None:
            spoken = [(wave, clip.recording.text) for wave, clip in zip(waves, batch, strict=True)]
            of_clips = compute_each(f"tokenizer {role.spec}", encode, spoken)
        else:
            of_frames = zip(teacher_frames(role.teacher, waves), batch, strict=True)
            of_clips = (
                f if isinstance(f, str) else frame_tokens(role.teacher, role.tokenizer, f, clip.seconds)
                for f, clip in of_frames
            )
        for ids in of_clips:
            if isinstance(ids, str):
                yield {REASON: ids}
            else:
                yield {"ids": ids} if len(ids) else {REASON: f"tokenizer {role.spec} gives no tokens"}

    clips = [clip for split in SPLITS for clip in splits[split]]
    texts = [clip.recording.text for clip in clips]
    # The identity in the tokenizer's file is that of the teacher when it was fitted.
    placed = [] if role.teacher is None or role.teacher.start is None else [role.teacher.start]
    folder = job.work_folder(role.name, [role.identity, decoded_from(clips, job.data), texts, *placed])
    tokens = BatchPass(job.pool, folder, read, compute)
    own = job.ranks.part_of(batches_by_length(clips))
    with job.stage(role.name, sum(map(len, own))) as stage:
        tokens.run(own, stage)
    return tokens
