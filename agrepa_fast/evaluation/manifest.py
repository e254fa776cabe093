"""The clips of an evaluation, by content: two results may be compared if their manifests have the same hash."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..data.index import Index
from ..data.reading import fixed_clips
from ..data.samples import Sample
from ..errors import UserError
from ..metrics_config import MetricsConfig
from ..seeds import derive_seed


@dataclass(frozen=True)
class Clip:
    """One clip and one draw of its noise. text: "" if the clip has none, or is cut and has that of a longer recording;
    mel: SHA-256 of its stored mel."""

    domain: str
    key: str
    draw: int
    frames: int
    text: str
    mel: str

    @property
    def name(self) -> str:
        return self.key if self.draw == 0 else f"{self.key}~{self.draw + 1}"

    @property
    def noise_key(self) -> int:
        """The key of the sampler's noise: that of the clip, so that neither batch nor run changes it."""
        return derive_seed(self.domain, self.key, self.draw, "evaluate")


def evaluated_samples(index: Index, metrics: MetricsConfig, domains: Sequence[str]) -> list[Sample]:
    """Return the validation clips that are evaluated: metrics.clips of each domain, or all. Raises UserError if the
    shards have too few of a domain, or none."""
    samples = []
    for domain in domains:
        if (there := index.clips("val", domain)) == 0:
            raise UserError(
                f"{index.folder} has no {domain} clips for validation: prepare more recordings or a larger "
                "data.val_share, or evaluate another domain (--domain)"
            )
        samples += fixed_clips(index, "val", domain, metrics.clips or there, "metrics.clips")
    of_key: dict[str, str] = {}
    for sample in samples:
        if of_key.setdefault(sample.key, sample.domain) != sample.domain:  # their wavs would have one name
            raise UserError(
                f"{index.folder} has a clip {sample.key} of {of_key[sample.key]} and one of {sample.domain}: evaluate "
                "the domains apart, with --domain and --out"
            )
    return samples


def clips_of(samples: Sequence[Sample], draws: int) -> list[Clip]:
    """Return the clips of an evaluation, draw by draw."""
    return [
        Clip(s.domain, s.key, draw, s.frames, "" if s.cut else s.text, mel_digest(s.mel))
        for draw in range(draws)
        for s in samples
    ]


def manifest_hash(clips: Sequence[Clip]) -> str:
    """Return 16 hex digits of the clips' content: keys, texts, lengths, mels and noise, in any order."""
    rows = sorted(json.dumps(asdict(clip) | {"noise": clip.noise_key}, sort_keys=True) for clip in clips)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def mel_digest(mel: np.ndarray) -> str:
    """Return 16 hex digits of a stored mel."""
    return hashlib.sha256(mel.tobytes()).hexdigest()[:16]
