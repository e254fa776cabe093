"""WebDataset shards of features and their index.json: the format and its writer; reading.py reads them.

Per sample: `<key>.json` (domain, text, labels, frames, seconds, cut, source, licence), `<key>.mel.npy` fp16 (T, n_mels)
natural-log mel, `<key>.tokens.npy` int32 (S,) ids counted over all domains, `<key>.<teacher>.npy` fp16 (dim,), the mean
of the teacher's frames. Files `<split>-<domain>-<nnnn>.tar`; the same features give the same bytes. No pickle anywhere.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import DOMAINS, DataConfig, UserError
from .tokens import read_code_mels

SCHEMA = 1
SPLITS = ("train", "val")
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One tar of clips of one domain."""

    path: Path
    clips: int
    domain: str


@dataclass(frozen=True)
class TeacherInfo:
    """The frozen encoder of a domain; mean (dim,) float32 over the train clips' pooled vectors."""

    name: str
    dim: int
    mean: np.ndarray


@dataclass
class Sample:
    """One clip. mel (T, n_mels) fp16 natural log, tokens (S,) int32, teacher (dim,) fp16; frames is T."""

    key: str
    domain: str
    text: str
    labels: tuple[str, ...]
    frames: int
    seconds: float
    cut: bool  # the clip is a part of its recording, `text` that of the whole
    source: str
    licence: str
    mel: np.ndarray
    tokens: np.ndarray
    teacher: np.ndarray


@dataclass(frozen=True)
class Index:
    """A folder of shards, read from its index.json; see load_index."""

    folder: Path
    content: dict  # index.json

    @cached_property
    def domains(self) -> tuple[str, ...]:
        return tuple(domain for domain in DOMAINS if domain in self.content["domains"])

    @property
    def features(self) -> dict:
        """The data.* settings that the features were computed with."""
        return self.content["features"]

    @property
    def n_mels(self) -> int:
        return self.features["n_mels"]

    @property
    def vocab(self) -> int:
        """Token ids of all domains, prepared or not: a domain that is added later finds its ids reserved."""
        return len(DOMAINS) * self.features["codebook"]

    @cached_property
    def mel_mean(self) -> float:
        """Mean of all values of the train mels, all domains together."""
        return self._mel_sum("sum") / self._mel_values()

    @cached_property
    def mel_std(self) -> float:
        return (self._mel_sum("sum_squares") / self._mel_values() - self.mel_mean**2) ** 0.5

    def _mel_sum(self, name: str) -> float:
        return sum(self.content["domains"][domain]["mel"][name] for domain in self.domains)

    def _mel_values(self) -> int:
        return self._mel_sum("frames") * self.n_mels

    def clips(self, split: str, domain: str) -> int:
        """Number of clips; 0 for a domain that is not prepared."""
        return sum(shard.clips for shard in self.shards(split, domain))

    def shards(self, split: str, domain: str) -> tuple[Shard, ...]:
        if split not in SPLITS or domain not in DOMAINS:
            raise ValueError(f"split {split!r} of {SPLITS}, domain {domain!r} of {DOMAINS}")
        return tuple(
            Shard(self.folder / entry["file"], entry["clips"], domain)
            for entry in self.content["shards"]
            if (entry["split"], entry["domain"]) == (split, domain)
        )

    def teacher(self, domain: str) -> TeacherInfo:
        entry = self.content["domains"][domain]["teacher"]
        return TeacherInfo(entry["name"], entry["dim"], np.asarray(entry["mean"], np.float32))

    def token_range(self, domain: str) -> tuple[int, int]:
        """First id of a domain, and the first id after it."""
        tokens = self.content["domains"][domain]["tokens"]
        return tokens["offset"], tokens["offset"] + tokens["vocab"]

    def code_mels(self) -> np.ndarray:
        """(vocab, n_mels) float32: mean natural-log mel of each code; ids of a missing domain get the overall mean."""
        mels = np.full((self.vocab, self.n_mels), self.mel_mean, np.float32)
        for domain in self.domains:
            first, end = self.token_range(domain)
            mels[first:end] = read_code_mels(self.folder / self.content["domains"][domain]["tokens"]["file"])
        return mels


def load_index(folder: Path, verify: bool = True) -> Index:
    """The shards of a folder. Sizes are always checked, checksums with `verify`.

    Raises UserError for a folder without shards, a missing or changed file, and an index of another version.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        what = "is no folder" if not folder.is_dir() else f"has no {INDEX}"
        raise UserError(
            f"{folder} {what}: write it with `agrepa prepare demo` or `agrepa prepare folder` --out {folder}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        if missing := {"features", "domains", "shards"} - content.keys():
            raise KeyError(f"no {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy(folder)}") from error
    if schema != SCHEMA:
        raise UserError(f"{path} has schema version {schema}, this release reads {SCHEMA}: {remedy(folder)}")
    _verify_files(folder, content, verify)
    return Index(folder, content)


def matching_index(data: DataConfig, verify: bool = True) -> Index:
    """The index of data.path. Raises UserError, too, when its features were made with other settings than `data`'s."""
    index = load_index(Path(data.path), verify)
    settings = [(name, there, getattr(data, name)) for name, there in index.features.items()]
    for domain in index.domains:
        name = f"{domain}_teacher"
        settings.append((name, index.content["domains"][domain]["teacher"]["spec"], getattr(data, name)))
    for name, there, here in settings:
        if there != here:
            raise UserError(
                f"{index.folder} was prepared with data.{name}={there}, the run has {here}: set data.{name}={there}, "
                "or prepare the recordings again"
            )
    return index


def remedy(folder: Path) -> str:
    return f"remove {folder} and run `agrepa prepare` again"


def _verify_files(folder: Path, content: dict, checksums: bool) -> None:
    files = content["shards"] + [entry["tokens"] for entry in content["domains"].values()]
    total = sum(entry["bytes"] for entry in files)
    with tqdm(total=total, desc="verify shards", unit="B", unit_scale=True, delay=5, disable=not checksums) as bar:
        for entry in files:
            path = folder / entry["file"]
            if not path.is_file():
                raise UserError(f"{path} is missing: {remedy(folder)}")
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise UserError(f"{path} has {size} bytes, not {entry['bytes']}: {remedy(folder)}")
            if checksums and (found := file_sha256(path)) != entry["sha256"]:
                raise UserError(f"{path} has SHA-256 {found}, not {entry['sha256']}: {remedy(folder)}")
            bar.update(size)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_shard(path: Path, samples: Iterable[Sample], teacher: str) -> dict:
    """Write one tar atomically. Returns what index.json says of a file: file, clips, bytes, sha256."""
    from webdataset.writer import TarWriter

    part = path.with_name(f".{path.name}.part")
    clips = 0
    with part.open("wb") as stream, TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write(_members(sample, teacher))
            clips += 1
    part.replace(path)
    return {"file": path.name, "clips": clips, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _members(sample: Sample, teacher: str) -> dict:
    fields = ("domain", "text", "labels", "frames", "seconds", "cut", "source", "licence")
    meta = {name: getattr(sample, name) for name in fields}
    return {
        "__key__": sample.key,
        "json": json.dumps(meta, ensure_ascii=False).encode(),
        "mel.npy": _npy(sample.mel),
        "tokens.npy": _npy(sample.tokens),
        f"{teacher}.npy": _npy(sample.teacher),
    }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """The file is the old one or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def write_index(folder: Path, content: dict) -> None:
    write_atomically(folder / INDEX, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
