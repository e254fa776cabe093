"""Recordings, and the source that lists them: the input of `agrepa prepare`."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..audio.waves import decode
from ..config import DOMAINS
from ..errors import UserError, nearest

MAX_BAD_SHARE, MAX_BAD = 0.02, 3  # beyond both, the recordings are not the ones that the user meant
_KINDS = 12  # named in a line
_EVALUATION = ("dev", "test", "eval")  # begin the names of subsets that published results are measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One recording, or one part of a long one, that becomes one clip. Here it is a file; subclasses read other places.

    Millions of them are in memory at once, hence slots, and a str for the path.
    """

    name: str  # unique and stable, of letters, digits, - and _ only: the WebDataset key
    path: str
    domain: str  # speech or audio
    source: str  # package and file, or the path inside the folder
    licence: str
    text: str = ""  # transcript of the whole file, "" if there is none
    labels: tuple[str, ...] = ()
    start: float = 0.0  # seconds into the file
    group: str = ""  # the train and validation splits never share a group; "" stands for the name
    problem: str = ""  # why it cannot be used, if that is known before it is read

    @property
    def split_group(self) -> str:
        return self.group or self.name

    def read(self, seconds: float) -> tuple[np.ndarray, int]:
        """Return at most `seconds` from `start` on: the wave (samples,) float32 mono, and its rate in Hz.

        Raises UserError, beginning with `source`, for a recording that has a problem or cannot be decoded.
        """
        if self.problem:
            raise UserError(f"{self.source}: {self.problem}")
        return decode(self.content(), self.source, self.start, seconds)

    def content(self) -> str | bytes:
        """Return the path of a file, or the file's bytes. Raises UserError, beginning with `source`."""
        return self.path

    def fingerprint(self) -> list:
        """Return numbers and texts that change with the content. Reads no content."""
        return [self.problem] if self.problem else [*size_and_mtime(self.path), self.start]


class PassedOver(NamedTuple):
    """Something that a source has seen, and has not taken for a recording."""

    name: str  # like Recording.source
    kind: str  # those of one kind are counted together
    reason: str


@dataclass(frozen=True)
class Source:
    """The recordings of one domain. `identity` changes if they change, and costs no download."""

    domain: str
    name: str
    identity: str
    recordings: Callable[[], list[Recording]]
    passed_over: Callable[[], Sequence[PassedOver]] = tuple

    @classmethod
    def of(
        cls, name: str, domain: str, recordings: list[Recording], passed_over: Sequence[PassedOver] = ()
    ) -> "Source":
        """Return the source of recordings that are listed already. Raises UserError for two of one name, and for a
        missing file."""
        hasher, names = hashlib.sha256(), set()
        for recording in recordings:
            if recording.name in names:
                raise UserError(f"{name}: {recording.source} and another recording are both called {recording.name}")
            names.add(recording.name)
            line = repr((recording.name, recording.text, recording.labels, recording.group, recording.fingerprint()))
            hasher.update(line.encode("utf-8", "surrogateescape"))
        return cls(domain, printable(name), hasher.hexdigest()[:16], lambda: recordings, lambda: passed_over)


def count_kinds(kinds: Iterable[str]) -> str:
    """Return "5 x .pdf file, 2 x link, …", the most frequent kinds first; "nothing" without any."""
    counts = Counter(kinds).most_common()
    more = [f"{sum(count for _, count in counts[_KINDS:])} of other kinds"] if len(counts) > _KINDS else []
    return ", ".join([f"{count} x {kind}" for kind, count in counts[:_KINDS]] + more) or "nothing"


def too_many_bad(bad: int, total: int) -> bool:
    """Whether so many of `total` recordings are unusable that the user should look at them first."""
    return (bad > MAX_BAD and bad > MAX_BAD_SHARE * total) or total - bad < 2


def size_and_mtime(path: str | Path) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change in ns. Raises UserError for a missing file."""
    try:
        stat = os.stat(path)  # noqa: PTH116 - for millions of files: Path.stat takes three times as long
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run `agrepa prepare` again") from error
    return stat.st_size, stat.st_mtime_ns


def check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise UserError(f"domain {domain!r} is unknown: {nearest(domain, DOMAINS)}")


def key_of_path(path: str) -> str:
    """Return the WebDataset key of a path inside a source: readable, and unique by a hash of the whole path."""
    # The hash tells names apart that differ only in replaced characters or in the suffix.
    digest = hashlib.sha1(path.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{key_characters(re.sub(r'[.][^./]*$', '', path))[-80:]}-{digest}"


def key_characters(name: str) -> str:
    """Return a name with the characters that a WebDataset key may have; - replaces the others."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)


def printable(name: str) -> str:
    """Return a file name with ? for bytes, and halves of characters, that UTF-8 cannot write."""
    return name.encode("utf-8", "replace").decode()


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file. Raises UserError for other encodings, and if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}): convert it or remove it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): repair it or remove it") from error


def read_transcripts(path: str | Path) -> dict[str, str]:
    """Return {utterance: text} of a file with LibriSpeech's lines `utterance TEXT`."""
    lines = (line.partition(" ") for line in read_text(path).splitlines())
    return {name: text for name, _, text in lines if name}


def without_evaluation(domain: str, subsets: list[Path]) -> list[Path]:
    """Return the subsets to train on, and print the others. Returns all of them if all are for evaluation."""
    kept = [subset for subset in subsets if not subset.name.startswith(_EVALUATION)]
    if kept and len(kept) < len(subsets):
        left_out = ", ".join(subset.name for subset in subsets if subset not in kept)
        print(f"{domain}: {left_out} left out, for evaluation; to prepare one, name it as the path")
    return kept or subsets
