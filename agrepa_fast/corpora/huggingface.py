"""Recordings in the rows of a Hugging Face `datasets` folder on disk: save_to_disk's, or parquet files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import UserError
from .descriptions import GROUPS, LABELS, LICENCES, TEXTS, recording_fields
from .recordings import Recording, Source, check_domain, key_characters, printable, size_and_mtime
from .walk import walk_folders

_ROWS = 10_000  # read at once for their descriptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow(Recording):
    """A row of the dataset in the folder `path`."""

    split: str | None
    version: str  # of the dataset's files
    column: str
    row: int

    def content(self) -> str | bytes:
        audio = _audio(self.path, self.version, self.split, self.column)[self.row][self.column]
        content, path = (audio["bytes"], audio["path"]) if isinstance(audio, dict) else (None, audio)
        if isinstance(path, bytes):
            return path
        if content is not None:
            return content
        if not path:
            raise UserError(f"{self.source}: {self.column} is empty")
        folder = Path(self.path).resolve()
        file = (folder / path).resolve()
        if not file.is_relative_to(folder):  # a dataset from elsewhere does not choose which files are read
            raise UserError(f"{self.source}: {path} lies outside {folder}: store the bytes (save_to_disk does)")
        return str(file)

    def fingerprint(self) -> list:
        return [self.version, self.split, self.column, self.row]


def hf_source(
    path: Path,
    domain: str,
    *,
    split: str | None = None,
    audio: str | None = None,
    text: str | None = None,
    label: str | None = None,
) -> Source:
    """Return the rows of a dataset as a source. `path` is a folder written by `datasets`, or one of parquet files,
    which `datasets` copies into its cache as arrow.

    Columns that are not given are found: the one of type Audio, and the usual names (TEXTS, LABELS, GROUPS). Raises
    UserError for a missing package, a folder that holds no dataset, and a missing split or column.
    """
    check_domain(domain)
    version = _version(path)
    table = _open(str(path), split)
    audio = audio or _audio_column(path, table)
    for column in (audio, text, label):
        if column is not None and column not in table.column_names:
            raise UserError(f"{path} has no column {column}: its columns are {', '.join(table.column_names)}")
    if not _holds_audio(table.features[audio]):
        raise UserError(f"{path}: column {audio} holds no audio but {table.features[audio]}: name another with --audio")
    _audio(str(path), version, split, audio)  # once, before threads ask for it
    place = [path.absolute().name, *([split] if split else [])]
    recordings = [
        TableRow(
            name=f"{'-'.join(map(key_characters, place))[-60:]}-{row:08d}",
            path=str(path),
            domain=domain,
            source=printable(f"{'/'.join(place)} row {row}"),
            split=split,
            version=version,
            column=audio,
            row=row,
            **fields,
        )
        for row, fields in enumerate(_descriptions(table, text, label))
    ]
    if not recordings:
        raise UserError(f"{path} holds no rows")
    return Source.of(str(path), domain, recordings)


def _version(path: Path) -> str:
    """Return a hash of the names, sizes and times of the folder's files. Reads none of them."""
    files = sorted(Path(folder, name) for folder, names in walk_folders(path) for name in names)
    files = [file for file in files if file.suffix in (".arrow", ".parquet", ".json")]
    listed = [(file.relative_to(path).as_posix(), *size_and_mtime(file)) for file in files]
    return hashlib.sha256(repr(listed).encode("utf-8", "surrogateescape")).hexdigest()[:16]


@lru_cache(maxsize=4)
def _audio(path: str, version: str, split: str | None, column: str):
    """Return the Dataset of the audio column, memory-mapped and left encoded. `version` only keys the cache."""
    import datasets

    table = _open(path, split).select_columns(column)
    if isinstance(table.features[column], datasets.Audio):
        return table.cast_column(column, datasets.Audio(decode=False))
    return table


def _open(path: str, split: str | None):
    """Return the Dataset of a folder, or the split of its DatasetDict."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: the package datasets is needed to read it: pip install datasets") from error

    saved = any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved and not any(Path(path).rglob("*.parquet")):
        raise UserError(f"{path} holds no dataset: a folder of save_to_disk, or one of parquet files, is read")
    try:
        table = (
            datasets.load_from_disk(path)
            if saved
            else datasets.load_dataset("parquet", data_dir=str(Path(path).absolute()))
        )
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as a dataset ({reason}): write it again with save_to_disk") from error
    splits = table if isinstance(table, dict) else {split or "": table}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits or splits is not table:
        named = (
            f"has the splits {', '.join(splits)}: choose one with" if splits is table else "has no splits: leave out"
        )
        raise UserError(f"{path} {named} --split")
    return table[split]


def _holds_audio(feature) -> bool:
    import datasets

    if isinstance(feature, datasets.Audio):
        return True
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return getattr(feature, "dtype", "") in ("binary", "large_binary", "string", "large_string")


def _audio_column(path: Path, table) -> str:
    import datasets

    features = table.features
    choices = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    choices = choices or [name for name, value in features.items() if isinstance(value, dict) and _holds_audio(value)]
    choices = choices or [name for name, feature in features.items() if name == "audio" and _holds_audio(feature)]
    if len(choices) != 1:
        columns = ", ".join(table.column_names)
        raise UserError(f"{path}: {len(choices)} of the columns {columns} look like audio: name one with --audio")
    return choices[0]


def _descriptions(table, text: str | None, label: str | None) -> Iterator[dict]:
    """Yield text, labels, group and licence per row."""
    texts, labels = (text,) if text else TEXTS, (label,) if label else LABELS
    wanted = [name for name in (*texts, *labels, *GROUPS, *LICENCES) if name in table.column_names]
    names = {name: _class_names(table.features[name]) for name in wanted}
    for batch in table.select_columns(wanted).iter(_ROWS) if wanted else []:
        for values in zip(*(batch[name] for name in wanted), strict=True):
            fields = {name: _named(value, names[name]) for name, value in zip(wanted, values, strict=True)}
            yield recording_fields(fields, texts, labels)
    if not wanted:
        yield from (recording_fields({}) for _ in range(len(table)))


def _class_names(feature) -> list[str] | None:
    """Return the names of a ClassLabel, or of a list of them; None for other columns."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _named(value: object, names: list[str] | None) -> object:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if names is None or value is None:
        return value
    return names[value] if 0 <= value < len(names) else None  # -1: unlabelled
