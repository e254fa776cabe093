"""Which tokenizers a domain's clips get, and the passes that its teacher's pass cannot do on the way.

Roles: `tokens`, and `tokens2` where data.extra_tokens asks for topology B. A tokenizer of the domain's own teacher's
frames runs in that teacher's pass (encode.py); one of another teacher, or of waves, in a pass of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DOMAINS, DataConfig
from ..data.index import SPLITS
from ..errors import UserError
from ..files import file_sha256
from ..tokenizers.kmeans import FrameTokenizer, WaveTokenizer, tokens_of_frames
from .decode import Clip, ahead, cut_wave, digest
from .job import Job, work_file, work_names, write_work
from .teacher_pass import batches_of, teacher_frames


@dataclass(frozen=True)
class Role:
    """One kind of token of a domain."""

    name: str  # tokens or tokens2
    spec: str
    vocab: int
    offset: int  # first id in the shards; tokens2 are the same for both domains
    tokenizer: FrameTokenizer | WaveTokenizer | None  # None: k-means, fitted on the way
    teacher: Any  # whose frames it takes, None: waves

    @property
    def rate(self) -> float:
        """Tokens per second."""
        if isinstance(self.tokenizer, WaveTokenizer):
            return self.tokenizer.rate
        return self.teacher.rate / (self.tokenizer.stride if self.tokenizer else 1)

    @property
    def identity(self) -> dict:
        return self.tokenizer.identity if self.tokenizer else {"spec": self.spec, "teacher": self.teacher.identity}

    def entry(self) -> dict:
        """What index.json says of it."""
        about = {"kind": self.spec.partition(":")[0], "spec": self.spec, "vocab": self.vocab, "offset": self.offset}
        teacher = self.teacher.name if self.teacher else None
        return {**about, "rate": self.rate, "teacher": teacher, "identity": self.identity}


def domain_roles(job: Job, teacher, teacher_of: Callable) -> list[Role]:
    """The roles of a domain whose own teacher is `teacher`; teacher_of(spec) loads another. Every rank calls it.

    Raises UserError for a tokenizer that cannot be loaded, whose vocabulary is not data.codebook (data.extra_codebook),
    or whose teacher has other weights than the one it was fitted on.
    """
    data, setting = job.data, f"{job.domain}_tokens"
    offset = DOMAINS.index(job.domain) * data.codebook
    roles = [_role(job, "tokens", setting, ("codebook", offset), teacher, teacher_of)]
    if data.extra_tokens is not None:
        roles.append(_role(job, "tokens2", "extra_tokens", ("extra_codebook", 0), teacher, teacher_of))
    return roles


def _role(job: Job, name: str, setting: str, ids: tuple[str, int], teacher, teacher_of: Callable) -> Role:
    spec, (vocab_setting, offset) = getattr(job.data, setting), ids
    vocab = getattr(job.data, vocab_setting)
    if spec == "kmeans":
        return Role(name, spec, vocab, offset, None, teacher)
    tokenizer = job.ranks.load_on_every_rank(spec, partial(load_tokenizer, spec))
    if tokenizer.codes != vocab:
        raise UserError(
            f"data.{setting}={spec} has {tokenizer.codes} codes, data.{vocab_setting} is {vocab}: "
            f"set data.{vocab_setting}={tokenizer.codes}" + ", which holds for both domains" * (name == "tokens")
        )
    if isinstance(tokenizer, WaveTokenizer):
        return Role(name, spec, vocab, offset, tokenizer, None)
    fitted_on = tokenizer.identity["teacher"]
    if not same_weights(teacher.identity, fitted_on):
        teacher = teacher_of(fitted_on["spec"])
        if not same_weights(teacher.identity, fitted_on):
            raise UserError(
                f"data.{setting}={spec} was fitted on the frames of {fitted_on['spec']}, which has other weights now: "
                f"fit it again"
            )
    return Role(name, spec, vocab, offset, tokenizer, teacher)


def same_weights(one: dict, other: dict) -> bool:
    """Whether two teachers give the same frames, but for their precision, by whatever name they were found."""
    return all(one[name] == other[name] for name in ("class", "layer", "sha256"))


def load_tokenizer(spec: str, device: str = "cpu") -> FrameTokenizer | WaveTokenizer:
    """What vq:FILE or s3:NAME names."""
    from ..tokenizers.s3 import load_s3
    from ..tokenizers.vq import VqTokenizer

    kind, _, source = spec.partition(":")
    return VqTokenizer.load(Path(source), device) if kind == "vq" else load_s3(source, device)


def check_tokens(out: Path, data: DataConfig, content: dict, domain: str) -> None:
    """UserError when a domain that is in the index got its tokens from another tokenizer than `data` names."""
    there, setting = content["domains"][domain]["tokens"], f"{domain}_tokens"
    if there["spec"] != getattr(data, setting):
        was = f"data.{setting}={there['spec']}, not {getattr(data, setting)}"
        raise UserError(f"{out} was prepared with {was}: choose another --out, or remove {out}")
    _check_file(out, there)


def check_extra(out: Path, data: DataConfig, content: dict) -> None:
    """UserError when the second tokens of any domain are of a file that has changed: they share one vocabulary."""
    for domain in content["domains"].values():
        if data.extra_tokens is not None:
            _check_file(out, domain["tokens2"])


def _check_file(out: Path, entry: dict) -> None:
    kind, _, path = entry["spec"].partition(":")
    if kind == "vq" and Path(path).is_file() and file_sha256(Path(path)) != entry["identity"]["sha256"]:
        raise UserError(f"{out} was prepared with another {path}, which has changed since: choose another --out")


class TokenStage:
    """The ids of a role in a pass of its own."""

    def __init__(self, job: Job, role: Role, splits: dict[str, list[Clip]]):
        self.job, self.role, self.splits = job, role, splits
        every = [clip.file.name for split in SPLITS for clip in splits[split]]
        self.folder = job.folder(role.name, digest([role.identity, every]))

    def run(self) -> None:
        clips = [clip for split in SPLITS for clip in self.splits[split]]
        own = self.job.ranks.part_of(batches_of(clips, lambda clip: (clip.frames, clip.recording.name)))
        there = work_names(self.folder)
        missing = [batch for batch in own if any(self._file(clip).name not in there for clip in batch)]
        with self.job.stage(self.role.name, sum(map(len, own))) as stage:
            stage.skip(sum(map(len, own)) - sum(map(len, missing)))
            for batch, waves in zip(missing, ahead(self.job.pool, self._waves, missing, depth=2), strict=True):
                for clip, ids in zip(batch, self._ids(batch, waves), strict=True):
                    write_work(self._file(clip), ids=ids)
                    stage.done(clip.seconds)

    def ids(self, clip: Clip) -> np.ndarray:
        """(S,) int32."""
        with np.load(self._file(clip), allow_pickle=False) as stored:
            return stored["ids"]

    def _file(self, clip: Clip) -> Path:
        return work_file(self.folder, f"{clip.file.stem}.npz")

    def _waves(self, batch: list[Clip]) -> list[np.ndarray]:
        rate = (self.role.teacher or self.role.tokenizer).sample_rate
        return [cut_wave(clip.recording, self.job.data, rate) for clip in batch]

    def _ids(self, batch: list[Clip], waves: list[np.ndarray]) -> list[np.ndarray]:
        tokenizer, teacher = self.role.tokenizer, self.role.teacher
        if teacher is None:
            return tokenizer.encode(waves)
        frames = teacher_frames(teacher, waves, [clip.recording.source for clip in batch], self.job.domain)
        return [tokenizer.encode(of_clip) for of_clip in frames]


def paired(tokens: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """Ids (S2,) of the same clip at another rate -> (S,), for each of `tokens` (S,) the one at its time."""
    return tokens_of_frames(extra, len(tokens))
