"""WebDataset shards of features and their index.json: the format, and the index as an object.

Per sample: `<key>.json` (domain, text, labels, frames, seconds, cut, source, licence), `<key>.mel.npy` fp16 (T, n_mels)
natural-log mel, `<key>.tokens.npy` int32 (S,) ids counted over all domains, for topology B `<key>.tokens2.npy` int32
(S,), with data.speaker `<key>.speaker.npy` fp32 (dim,), `<key>.<teacher>.npy` fp16, (dim,), the mean of the teacher's
frames, or (frames, dim); with data.teacher_attention each frame is followed by its queries and keys, (layers, 2, heads,
width). Files `<split>-<domain>-<nnnn>.tar`; a train shard's clips are of one length bucket. A teacher that was added
later is in `<split>-<domain>-<nnnn>.<teacher>.tar` beside each shard, in its order; speaker vectors that were, in
`<split>-<domain>-<nnnn>.speaker.tar`. The same features give the same bytes. No pickle anywhere.
"""

import hashlib
import json
import math
import re
import reprlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..domains import DOMAINS
from ..errors import UserError
from ..files import file_sha256, write_atomically
from .locations import Location, ReadError, Remote, locate, read_object
from .text import TextIds
from .transcribed import without_transcript

SCHEMA = 2
SPLITS = ("train", "val")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # no "/", nothing hidden, no URL
INDEX = "index.json"

# The names that every part of index.json must have, and the types of their values.
_FILE = {"file": str, "bytes": int, "sha256": str}
_SHARD = _FILE | {"split": str, "domain": str, "clips": int, "frames": int, "bucket": int}
_TOKENS = _FILE | {"spec": str, "offset": int, "vocab": int}
_MEL = {"frames": int, "sum": float | int, "sum_squares": float | int}
_TEACHER = {"spec": str, "dim": int, "rate": float | int | None, "mean": list, "files": dict | None}
_SPEAKER = {"dim": int, "files": dict | None}


@dataclass(frozen=True)
class Shard:
    """One tar of clips of one domain."""

    path: Location
    clips: int  # that are taken
    domain: str
    frames: int  # mel frames of these clips together
    bucket: int  # no clip has more mel frames; the same for all shards of a length bucket
    bytes: int
    sha256: str
    left_out: frozenset[int] = frozenset()  # places in the tar of the clips that are not taken

    @property
    def stored(self) -> int:
        """The number of clips in the tar."""
        return self.clips + len(self.left_out)

    @cached_property
    def places(self) -> list[int]:
        """The places in the tar of the clips that are taken."""
        return [place for place in range(self.stored) if place not in self.left_out]


@dataclass(frozen=True)
class TeacherInfo:
    """The targets of a frozen encoder in one domain."""

    name: str  # in `<key>.<name>.npy`
    spec: str  # as in data.<domain>_teacher
    dim: int
    rate: float | None  # frames per second stored; None: one pooled vector per clip
    mean: np.ndarray  # (dim,) float32, of the train clips' pooled vectors
    attention: tuple[int, ...] | None  # (layers, 2, heads, width) of the queries and keys stored with a frame
    files: dict[str, dict]  # shard -> file, bytes, sha256 of the sidecar with its clips' targets; {}: the shard itself


@dataclass(frozen=True)
class Index:
    """A folder of shards, read from its index.json; see load_index and matching_index."""

    folder: Location
    content: dict  # index.json
    chosen: dict[str, str] = field(default_factory=dict)  # domain -> name of the teacher to read; default: its first
    text: TextIds | None = None  # of the transcripts; set, only clips with a transcript of their own are taken
    normalize: bool = True  # False: mels are trained as they are, and mel_mean and mel_std are 0 and 1
    trained: tuple[float, float] | None = None  # mel_mean and mel_std of the run whose model reads these shards

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The domains that are prepared, of a model that takes text those with transcripts."""
        prepared = (domain for domain in DOMAINS if domain in self.content["domains"])
        return tuple(domain for domain in prepared if self.text is None or self.clips("train", domain))

    @property
    def features(self) -> dict:
        """The data.* settings that the features were computed with."""
        return self.content["features"]

    @property
    def n_mels(self) -> int:
        return self.features["n_mels"]

    @property
    def vocab(self) -> int:
        """Number of token ids of all domains, prepared or not: the ids of a domain that is added later are reserved."""
        return len(DOMAINS) * self.features["codebook"]

    @property
    def extra_vocab(self) -> int | None:
        """Number of ids of the second tokens, which both domains share; None if the shards have no second tokens."""
        return self.features["extra_codebook"] if self.features.get("extra_tokens") else None

    @property
    def speaker_dim(self) -> int | None:
        """Channels of the speaker vectors; None if the shards have none."""
        if not self.features.get("speaker"):
            return None
        return next(iter(self.content["domains"].values()))["speaker"]["dim"]

    @cached_property
    def mel_mean(self) -> float:
        """Mean of all values of the train mels, all domains together, which is taken off them."""
        if self.trained is not None:
            return self.trained[0]
        return self._mel_sum("sum") / self._mel_values() if self.normalize else 0.0

    @cached_property
    def mel_std(self) -> float:
        """Their standard deviation, which they are divided by."""
        if self.trained is not None:
            return self.trained[1]
        if not self.normalize:
            return 1.0
        return (self._mel_sum("sum_squares") / self._mel_values() - self.mel_mean**2) ** 0.5

    def _mel_sum(self, name: str) -> float:
        return sum(self.content["domains"][domain]["mel"][name] for domain in self.domains)

    def _mel_values(self) -> int:
        return self._mel_sum("frames") * self.n_mels

    def clips(self, split: str, domain: str) -> int:
        """Return the number of clips, 0 for a domain that is not prepared."""
        return sum(shard.clips for shard in self.shards(split, domain))

    def shards(self, split: str, domain: str) -> tuple[Shard, ...]:
        """Return the shards of a split and domain in the index's order, () for a domain that is not prepared."""
        if split not in SPLITS or domain not in DOMAINS:
            raise ValueError(f"split {split!r} of {SPLITS}, domain {domain!r} of {DOMAINS}")
        return self._shards.get((split, domain), ())

    @cached_property
    def _shards(self) -> dict[tuple[str, str], tuple[Shard, ...]]:
        """The shards of each split and domain."""
        shards: dict[tuple[str, str], list[Shard]] = {}
        for entry in self.content["shards"]:
            if (shard := self._shard(entry)).clips:
                shards.setdefault((entry["split"], entry["domain"]), []).append(shard)
        return {part: tuple(of_part) for part, of_part in shards.items()}

    def _shard(self, entry: dict) -> Shard:
        clips, frames, left_out = entry["clips"], entry["frames"], frozenset()
        if self.text is not None:
            frames, left_out = entry["transcribed"]["frames"], without_transcript(entry)
        return Shard(
            path=self.folder / entry["file"],
            clips=clips - len(left_out),
            frames=frames,
            left_out=left_out,
            **{name: entry[name] for name in ("domain", "bucket", "bytes", "sha256")},
        )

    def teacher(self, domain: str) -> TeacherInfo:
        """Return the chosen teacher of a domain."""
        return self._teachers[domain]

    @cached_property
    def _teachers(self) -> dict[str, TeacherInfo]:
        teachers = {}
        for domain in self.domains:
            entries = self.content["domains"][domain]["teachers"]
            name = self.chosen.get(domain, next(iter(entries)))
            entry = entries[name]
            mean, attention = np.asarray(entry["mean"], np.float32), entry.get("attention")
            facts = entry["spec"], entry["dim"], entry["rate"], mean, attention and tuple(attention)
            teachers[domain] = TeacherInfo(name, *facts, entry["files"] or {})
        return teachers

    def sidecars(self, shard: Shard) -> list[dict]:
        """Return file, bytes and sha256 of the sidecars of a shard: the chosen teacher's, and the speaker vectors'."""
        sidecars = [self.teacher(shard.domain).files.get(shard.path.name)]
        if self.speaker_dim is not None:
            sidecars.append((self.content["domains"][shard.domain]["speaker"]["files"] or {}).get(shard.path.name))
        return [sidecar for sidecar in sidecars if sidecar is not None]

    def token_range(self, domain: str) -> tuple[int, int]:
        """Return the first id of a domain, and the first id after it."""
        tokens = self.content["domains"][domain]["tokens"]
        return tokens["offset"], tokens["offset"] + tokens["vocab"]

    def most_tokens(self, frames: int) -> int:
        """Return a bound of the tokens of clips of up to so many mel frames, from the tokens' rates; `frames` if a rate
        is not known."""
        seconds = frames * self.features["hop_length"] / self.features["sample_rate"]
        rates = [self.content["domains"][domain]["tokens"].get("rate") for domain in self.domains]
        return frames if None in rates else max(math.ceil(rate * seconds) for rate in rates) + 1

    def most_teacher_frames(self, frames: int) -> int:
        """Return a bound of the teacher's frames of clips of up to so many mel frames. Every domain must have some."""
        seconds = frames * self.features["hop_length"] / self.features["sample_rate"]
        return max(round(self.teacher(domain).rate * seconds) for domain in self.domains) + 1

    def longest(self, frames: int) -> dict[str, int]:
        """Return the shape of clips of up to so many mel frames, as `pack` takes it. No clip has more ids of text than
        frames."""
        return {"frames": frames, "tokens": self.most_tokens(frames), "text": frames}

    def code_mels(self) -> np.ndarray:
        """Return the mean natural-log mel of each code, (vocab, n_mels) float32; ids of a missing domain get the mean
        of all mels. Raises UserError for a codebook whose bytes have changed."""
        mels = np.full((self.vocab, self.n_mels), self._mel_sum("sum") / self._mel_values(), np.float32)
        for domain in self.domains:
            first, end = self.token_range(domain)
            tokens = self.content["domains"][domain]["tokens"]
            mels[first:end] = _read_code_mels(self.folder / tokens["file"], tokens["sha256"], remedy(self.folder))
        return mels


def attention_layers(teacher: dict) -> int | None:
    """Return data.teacher_attention of an index's entry of a teacher."""
    return teacher["attention"][0] if "attention" in teacher else None


def load_index(folder: str | Location, verify: bool = True) -> Index:
    """Return the index of a folder or URL. Sizes of local files are always checked, checksums with `verify`.

    Raises UserError for a folder without shards, a missing or changed file, and an index of another schema version.
    """
    index = read_index(folder)
    files = index_files(index.content)
    total = sum(entry["bytes"] for entry in files)
    if isinstance(index.folder, Remote):
        return index
    with tqdm(total=total, desc="verify shards", unit="B", unit_scale=True, delay=5, disable=not verify) as bar:
        for entry in files:
            if fault := file_fault(index.folder, entry, verify):
                raise UserError(f"{fault}: {remedy(index.folder)}")
            bar.update(entry["bytes"])
    return index


def read_index(folder: str | Location) -> Index:
    """Return the index of a folder or URL without checking the files that it names. Raises UserError as load_index
    does."""
    folder = locate(folder)
    path = folder / INDEX
    try:
        content = json.loads(read_object(path).removeprefix(b"\xef\xbb\xbf").decode())
        schema = content["schema"]
        if schema == SCHEMA:
            _check_types(content)
        names = [entry["file"] for entry in index_files(content)] if schema == SCHEMA else []
    except ReadError as error:
        if error.kind != "missing" or isinstance(folder, Remote):
            raise
        fault = "is no folder" if not folder.is_dir() else f"has no {INDEX}"
        raise UserError(
            f"{folder} {fault}: write it with `agrepa prepare demo` or `agrepa prepare folder` --out {folder}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy(folder)}") from error
    if schema != SCHEMA:
        raise UserError(f"{path} has schema version {schema}, this release reads {SCHEMA}: {remedy(folder)}")
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise UserError(f"{path}: file {name!r} has a path; only files beside it are read: {remedy(folder)}")
    return Index(folder, content)


def _check_types(content: dict) -> None:
    """Raise ValueError for a part of index.json that is missing or of another type, or a number below 0."""
    _check_part("it", content, {"features": dict, "domains": dict, "shards": list})
    if not content["shards"]:
        raise ValueError("no shards")
    for shard in content["shards"]:
        _check_part("a shard", shard, _SHARD)
        if "transcribed" in shard:
            _check_part("a shard's transcripts", shard["transcribed"], {"frames": int, "mask": str})
    for name, domain in content["domains"].items():
        _check_part(name, domain, {"tokens": dict, "teachers": dict, "mel": dict})
        _check_part(f"{name}: tokens", domain["tokens"], _TOKENS)
        _check_part(f"{name}: mel", domain["mel"], _MEL)
        if not domain["teachers"]:
            raise ValueError(f"{name} has no teachers")
        for teacher, entry in domain["teachers"].items():
            _check_part(f"{name}: {teacher}", entry, _TEACHER)
        if "speaker" in domain:
            _check_part(f"{name}: speaker", domain["speaker"], _SPEAKER)
    for file in index_files(content):
        _check_part("a file", file, _FILE)


def _check_part(place: str, part: object, wanted: dict) -> None:
    if not isinstance(part, dict):
        raise ValueError(f"{place} is {reprlib.repr(part)}")
    for name, kind in wanted.items():
        if name not in part:
            raise ValueError(f"{place} has no {name}")
        value = part[name]
        if not isinstance(value, kind) or (kind is int and value < 0):
            raise ValueError(f"{place} has {name} = {reprlib.repr(value)}")


def remedy(folder: Location) -> str:
    """Return the advice that ends a message about damaged shards."""
    if isinstance(folder, Remote):
        return f"copy its shards to {folder} again"
    return f"remove {folder} and run `agrepa prepare` again"


def index_files(content: dict) -> list[dict]:
    """Return the entries of all files beside index.json: dicts with file, bytes and sha256."""
    files = list(content["shards"])
    for domain in content["domains"].values():
        files.append(domain["tokens"])
        for added in (*domain["teachers"].values(), domain.get("speaker", {"files": None})):
            files += (added["files"] or {}).values()
    return files


def file_fault(folder: Path, entry: dict, checksum: bool) -> str | None:
    """Return a line if a file of the index is missing, has another size or, with `checksum`, another SHA-256; else
    None."""
    path = folder / entry["file"]
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path} has {size} bytes, not {entry['bytes']}"
    if checksum and (sha256 := file_sha256(path)) != entry["sha256"]:
        return f"{path} has SHA-256 {sha256}, not {entry['sha256']}"
    return None


def write_index(folder: Path, content: dict) -> None:
    """Write index.json, which makes the folder complete: every file that it names must be there."""
    write_atomically(folder / INDEX, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _read_code_mels(file: Location, sha256: str, advice: str) -> np.ndarray:
    """Return the mean log-mel of each code, (codes, n_mels) float32."""
    from safetensors.numpy import load

    content = read_object(file)
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(f"{file} has SHA-256 {found}, not {sha256}: {advice}")
    return load(content)["mel"]
