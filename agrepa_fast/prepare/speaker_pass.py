"""The pass that gives every clip the vector of its speaker's voice (data.speaker)."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..data.index import SPLITS
from ..errors import UserError
from ..files import file_sha256, local_path
from ..teachers.campplus import CampPlus
from .decode import Clip, decoded_from
from .job import Job
from .passes import REASON, BatchPass, batches_by_length, compute_each


def load_speaker(job: Job) -> CampPlus | None:
    """Return the encoder of data.speaker, or None without. Every rank must call it."""
    spec = job.data.speaker
    return None if spec is None else job.ranks.load_on_every_rank(spec, lambda _device: CampPlus(spec))


def run_speaker_pass(job: Job, encoder: CampPlus, splits: dict[str, list[Clip]]) -> BatchPass:
    """Compute the vectors of all clips. Returns the pass, whose result(clip)["speaker"] is (dim,) fp32. Every rank must
    call it."""

    def read(batch: list[Clip]) -> list[np.ndarray]:
        return [clip.wave(encoder.sample_rate) for clip in batch]

    def compute(batch: list[Clip], waves: list[np.ndarray]) -> Iterable[dict[str, np.ndarray]]:
        for vector in compute_each(f"data.speaker={job.data.speaker}", partial(job.pool.map, encoder.vector), waves):
            yield {REASON if isinstance(vector, str) else "speaker": vector}

    clips = [clip for split in SPLITS for clip in splits[split]]
    folder = job.work_folder("speaker", [encoder.identity, decoded_from(clips, job.data)])
    vectors = BatchPass(job.pool, folder, read, compute)
    own = job.ranks.part_of(batches_by_length(clips))
    with job.stage("speaker", sum(map(len, own))) as stage:
        vectors.run(own, stage)
    return vectors


def check_speaker(out: Path, data: DataConfig, domains: dict[str, dict]) -> None:
    """Raise UserError if the vectors of a domain come from another file than data.speaker, or if that has changed: all
    domains share one."""
    if data.speaker is None:
        return
    path = local_path(data.speaker.partition(":")[2])
    for identity in (domain["speaker"]["identity"] for domain in domains.values() if "speaker" in domain):
        if identity["spec"] != data.speaker:
            was = f"data.speaker={identity['spec']}, not {data.speaker}"
            raise UserError(f"{out} was prepared with {was}: choose another --out, or remove {out}")
        if path.is_file() and file_sha256(path) != identity["sha256"]:
            raise UserError(f"{out} was prepared with another {path}, which has changed since: choose another --out")
