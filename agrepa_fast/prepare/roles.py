"""Token roles: the tokenizers that the clips of a domain get.

`tokens`, and `tokens2` if data.extra_tokens asks for topology B. A tokenizer of frames of the domain's own teacher runs
in that teacher's pass (teacher_pass.py), any other in a pass of its own (token_pass.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import DOMAINS, DataConfig
from ..errors import UserError
from ..files import file_sha256, local_path
from ..tokenizers import FrameTokenizer, WaveTokenizer, load_tokenizer
from .job import Job


@dataclass(frozen=True)
class TokenRole:
    """One kind of token of a domain."""

    name: str  # tokens or tokens2
    spec: str
    vocab: int
    offset: int  # first id in the shards; both domains share the ids of tokens2
    tokenizer: FrameTokenizer | WaveTokenizer | None  # None: k-means, fitted in the teacher's pass
    teacher: Any  # its frames are tokenized; None: waves are

    @property
    def rate(self) -> float:
        """Tokens per second."""
        if isinstance(self.tokenizer, WaveTokenizer):
            return self.tokenizer.rate
        return self.teacher.rate / (self.tokenizer.stride if self.tokenizer else 1)

    @property
    def sample_rate(self) -> int:
        """Hz of the waves that its tokens are computed from."""
        return (self.teacher or self.tokenizer).sample_rate

    @property
    def identity(self) -> dict:
        return self.tokenizer.identity if self.tokenizer else {"spec": self.spec, "teacher": self.teacher.identity}

    def index_entry(self) -> dict:
        about = {"kind": self.spec.partition(":")[0], "spec": self.spec, "vocab": self.vocab, "offset": self.offset}
        teacher = self.teacher.name if self.teacher else None
        return {**about, "rate": self.rate, "teacher": teacher, "identity": self.identity}


def domain_roles(job: Job, teacher, load_teacher: Callable[[str], Any]) -> list[TokenRole]:
    """Return the roles of a domain whose own teacher is `teacher`. load_teacher(spec) returns another one. Every rank
    must call it.

    Raises UserError for a tokenizer that cannot be loaded, or has more ids than data.codebook (tokens2:
    data.extra_codebook), and for one that was fitted on other weights of its teacher.
    """
    data, setting = job.data, f"{job.domain}_tokens"
    offset = DOMAINS.index(job.domain) * data.codebook
    roles = [_role(job, "tokens", setting, ("codebook", offset), teacher, load_teacher)]
    if data.extra_tokens is not None:
        roles.append(_role(job, "tokens2", "extra_tokens", ("extra_codebook", 0), teacher, load_teacher))
    return roles


def _role(
    job: Job, name: str, setting: str, ids: tuple[str, int], teacher, load_teacher: Callable[[str], Any]
) -> TokenRole:
    spec, (vocab_setting, offset) = getattr(job.data, setting), ids
    vocab = getattr(job.data, vocab_setting)
    if spec == "kmeans":
        return TokenRole(name, spec, vocab, offset, None, teacher)
    tokenizer = job.ranks.load_on_every_rank(spec, partial(load_tokenizer, spec))
    if tokenizer.codes > vocab:
        both = ", which holds for both domains" if name == "tokens" else ""
        raise UserError(
            f"data.{setting}={spec} has {tokenizer.codes} codes, data.{vocab_setting} is {vocab}: "
            f"set data.{vocab_setting}={tokenizer.codes}{both}"
        )
    if isinstance(tokenizer, WaveTokenizer):
        return TokenRole(name, spec, vocab, offset, tokenizer, None)
    fitted_on = tokenizer.identity["teacher"]
    if not _same_weights(teacher.identity, fitted_on):
        teacher = load_teacher(fitted_on["spec"])
        if not _same_weights(teacher.identity, fitted_on):
            raise UserError(
                f"data.{setting}={spec} was fitted on the frames of {fitted_on['spec']}, which has other weights now: "
                f"fit it again"
            )
    return TokenRole(name, spec, vocab, offset, tokenizer, teacher)


def _same_weights(identity: dict, other: dict) -> bool:
    """Whether two teachers give the same frames, except for their precision. Their specs may differ."""
    return all(identity[name] == other[name] for name in ("class", "layer", "sha256"))


def check_tokens(out: Path, data: DataConfig, domain: dict, setting: str) -> None:
    """Raise UserError if a domain in the index got its tokens from another tokenizer than `data` names."""
    prepared, wanted = domain["tokens"], getattr(data, setting)
    if prepared["spec"] != wanted:
        was = f"data.{setting}={prepared['spec']}, not {wanted}"
        raise UserError(f"{out} was prepared with {was}: choose another --out, or remove {out}")
    _check_unchanged(out, prepared)


def check_extra_tokens(out: Path, data: DataConfig, domains: dict[str, dict]) -> None:
    """Raise UserError if the file of any domain's second tokens has changed: all domains share one vocabulary."""
    for domain in domains.values():
        if data.extra_tokens is not None:
            _check_unchanged(out, domain["tokens2"])


def _check_unchanged(out: Path, entry: dict) -> None:
    kind, _, path = entry["spec"].partition(":")
    if kind == "vq" and local_path(path).is_file() and file_sha256(local_path(path)) != entry["identity"]["sha256"]:
        raise UserError(f"{out} was prepared with another {path}, which has changed since: choose another --out")
