"""What `agrepa prepare` works on: recordings, wherever their bytes are, and the source that lists them."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..audio.waves import decode
from ..config import DOMAINS
from ..errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording, or one part of a long one, that becomes one clip. Here a file; subclasses are found elsewhere.

    Millions of them are held at once, hence slots, and a str for the path.
    """

    name: str  # unique and stable, letters, digits, - and _ only: the WebDataset key
    path: str
    domain: str  # speech or audio
    text: str  # transcript of the whole file, "" when there is none
    labels: tuple[str, ...]
    source: str  # package and file, or the path inside the folder
    licence: str
    format: str  # file suffix without the dot, lower case
    start: float = 0.0  # seconds into the file
    group: str = ""  # clips of one group never meet across the train and validation splits; "" stands for the name
    problem: str = ""  # why it cannot be used, where that is known before it is read

    @property
    def split_group(self) -> str:
        return self.group or self.name

    def read(self, seconds: float) -> tuple[np.ndarray, int]:
        """The first `seconds` from `start` on, or what there is of them: wave (samples,) float32 mono, rate in Hz.

        Raises UserError, which begins with `source`, for a recording that has a problem or cannot be decoded.
        """
        if self.problem:
            raise UserError(f"{self.source}: {self.problem}")
        return decode(self.content(), self.source, self.start, seconds)

    def content(self) -> str | bytes:
        """The path of a file of its own, or its bytes. Raises UserError, which begins with `source`."""
        return self.path

    def stamp(self) -> list:
        """Numbers and texts that change when the content does; nothing is read for it."""
        return [self.problem] if self.problem else [*file_stamp(self.path), self.start]


@dataclass(frozen=True)
class Source:
    """The recordings of one domain; `identity` changes when they do and costs no download."""

    domain: str
    name: str
    identity: str
    recordings: Callable[[], list[Recording]]

    @classmethod
    def of(cls, name: str, domain: str, recordings: list[Recording]) -> "Source":
        """A source whose recordings have been listed. UserError when two have one name, or a file is gone."""
        hasher, names = hashlib.sha256(), set()
        for recording in recordings:
            if recording.name in names:
                raise UserError(f"{name}: {recording.source} and another recording are both called {recording.name}")
            names.add(recording.name)
            line = repr((recording.name, recording.text, recording.labels, recording.group, recording.stamp()))
            hasher.update(line.encode("utf-8", "surrogateescape"))
        return cls(domain, name, hasher.hexdigest()[:16], lambda: recordings)


def file_stamp(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns. UserError when the file is gone."""
    try:
        stat = os.stat(path)  # noqa: PTH116 - for millions of files: Path.stat takes three times as long
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run `agrepa prepare` again") from error
    return stat.st_size, stat.st_mtime_ns


def check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise UserError(f"domain {domain!r} is unknown: {nearest(domain, DOMAINS)}")


def key_of(inside: str) -> str:
    """A WebDataset key for a path or key inside a source: readable, and unique by a hash of the whole."""
    # The hash keeps names apart that differ only in replaced characters or in the suffix.
    digest = hashlib.sha1(inside.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{safe(re.sub(r'[.][^./]*$', '', inside))[-80:]}-{digest}"


def safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)


def printable(name: str) -> str:
    """Without the bytes of a file name, or the halves of characters, that UTF-8 cannot write."""
    return name.encode("utf-8", "replace").decode()


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. UserError when it is not one."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}): convert it or remove it") from error


def transcript_lines(path: str | Path) -> dict[str, str]:
    """Utterance -> text, from LibriSpeech's lines `utterance TEXT`."""
    return {name: text for name, _, text in (line.partition(" ") for line in read_text(path).splitlines())}


_EVALUATION = ("dev", "test", "eval")  # subsets that published results are measured on


def _without_evaluation(domain: str, subsets: list[Path]) -> list[Path]:
    """Nobody who names a whole corpus means to train on what results are measured on."""
    kept = [subset for subset in subsets if not subset.name.startswith(_EVALUATION)]
    if kept and len(kept) < len(subsets):
        left_out = ", ".join(subset.name for subset in subsets if subset not in kept)
        print(f"{domain}: {left_out} left out, for evaluation; to prepare one, name it as the path")
    return kept or subsets
