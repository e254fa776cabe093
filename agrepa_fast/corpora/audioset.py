"""AudioSet, from its csv files and the audio of its segments."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from ..audio.waves import AUDIO_SUFFIXES, SOUNDFILE_SUFFIXES
from ..errors import UserError
from .recordings import PassedOver, Recording, Source, printable, read_text, without_evaluation
from .walk import Walk

_TABLES = ("balanced_train_segments.csv", "eval_segments.csv", "unbalanced_train_segments.csv")
_LABELS = "class_labels_indices.csv"
_SITE = "https://research.google.com/audioset/download.html"
# <YTID>.flac, Y<YTID>.wav (PANNs), <YTID>_30.000.wav, <YTID>_30_40.wav, <YTID>_30.0-40.0.wav (audioset-download),
# <YTID>_30000_40000.flac (ms). A YTID always has 11 letters, so that one beginning with Y is not mistaken for a prefix.
_FILE_NAME = re.compile(r"Y?([\w-]{11})(?:_(\d{1,12}(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?", re.ASCII)
_LONGEST = 1e9  # seconds
_YTID = re.compile(r"[\w-]{11}", re.ASCII)


def audioset_source(path: Path) -> Source:
    """Return AudioSet's segments as a source. `path` is a folder that holds its csv files and, below it, the audio of
    its segments, cut; or one csv.

    Leaves out eval_segments.csv of a folder that has other tables, too. Prints how many segments have no file (videos
    are deleted) and how many files belong to no segment. Groups are videos.
    """
    root = path.parent if path.is_file() else path
    walk = Walk(root)
    files, tables = _audio_and_tables(walk, path)
    if path.is_file():
        tables[path.name] = path
    names = _label_names(tables.pop(_LABELS, None))
    if not tables:
        raise UserError(f"{path} holds none of {', '.join(_TABLES)}: get them from {_SITE}")
    found = [tables[name] for name in sorted(tables)]
    chosen = [path] if path.is_file() else without_evaluation("audio", found)
    for table in (table for table in found if table not in chosen):
        walk.pass_over(str(table), "table", "another is the path" if path.is_file() else "for evaluation")
    recordings, missing = _recordings(chosen, files, names, root)
    counts = f"{len(recordings)} segments with a file, {len(missing)} lines without"
    summary = f"{', '.join(table.name for table in chosen)}: {counts}"
    if not recordings:
        raise UserError(
            f"{path}: {summary}: {', '.join(AUDIO_SUFFIXES)} files named <YTID>, Y<YTID>, <YTID>_<start> or "
            f"<YTID>_<start>_<end> are looked for below {root}"
        )
    others = [file for file in files.values() if file is not None]
    for file in others:
        walk.pass_over(file, "file without a segment", "belongs to no segment of the tables")
    print(f"audio: {summary}; {len(others)} audio files belong to no segment of these")
    return Source.of(str(path), "audio", recordings, walk.passed_over + missing)


def _recordings(
    tables: list[Path], files: dict[str, str | None], names: dict[str, str], root: Path
) -> tuple[list[Recording], list[PassedOver]]:
    """Return the recordings of the tables' segments, and the lines without a file. Sets files[key] = None for
    the files of segments, so that a segment in two tables comes once."""
    recordings, missing, labels_of = [], [], {}
    for table in tables:
        for ytid, start, mids in _segments(table):
            keys = (f"{ytid} {round(start * 1000)}", f"{ytid} {round(start * 1000_000)}", ytid)
            key = next((key for key in keys if key in files), None)
            if key is None:
                missing.append(
                    PassedOver(f"{table.name}: {ytid}, {start:.3f}", "segment without a file", "no such file")
                )
                continue
            if (file := files[key]) is None:
                continue
            files[key] = None
            if mids not in labels_of:
                labels_of[mids] = tuple(names.get(mid.strip(), mid.strip()) for mid in mids.split(","))
            recording = Recording(
                name=f"audioset-{ytid}-{round(start * 1000)}",
                path=file,
                domain="audio",
                labels=labels_of[mids],
                source=printable(file[len(str(root)) + 1 :]),
                licence="the video's own; labels CC-BY-4.0",
                group=ytid,
            )
            recordings.append(recording)
    return recordings, missing


def _audio_and_tables(walk: Walk, path: Path) -> tuple[dict[str, str | None], dict[str, Path]]:
    """Return the audio files below a folder by "<YTID>" or "<YTID> <1000 x the number after it>", and AudioSet's csv
    files by name."""
    if not Path(walk.root).is_dir():
        raise UserError(f"{walk.root} is no folder: give the one that holds AudioSet's csv files and audio")
    files, more, tables = {}, {}, {}
    chosen = {path.name} if path.is_file() else set()
    for folder, names in walk.folders():
        found = {name for name in names if name in _TABLES or name == _LABELS}
        for name in sorted(found):
            if tables.setdefault(name, Path(folder, name)) != Path(folder, name):
                walk.pass_over(f"{folder}/{name}", "table", f"{printable(str(tables[name]))} is taken")
        for name in walk.recordings(folder, names, found | chosen):
            stem, dot, suffix = name.rpartition(".")
            if not (match := _FILE_NAME.fullmatch(stem)):
                walk.pass_over(f"{folder}/{name}", "file without a segment", "its name has no YTID")
                continue
            ytid, start = match.groups()
            key = ytid if start is None else f"{ytid} {round(float(start) * 1000)}"
            of_suffix = files if f"{dot}{suffix.lower()}" in SOUNDFILE_SUFFIXES else more
            if (taken := of_suffix.setdefault(key, f"{folder}/{name}")) != f"{folder}/{name}":
                walk.pass_over(f"{folder}/{name}", "second file of a segment", f"{printable(taken)} is taken")
    for key, file in more.items():
        if (taken := files.setdefault(key, file)) != file:
            walk.pass_over(file, "second file of a segment", f"{printable(taken)} is taken")
    return files, tables


def _label_names(table: Path | None) -> dict[str, str]:
    """Return {"/m/09x0r": "Speech", …}."""
    if table is None:
        print(f"audio: no {_LABELS}, so labels are codes such as /m/09x0r; get it from {_SITE}")
        return {}
    rows = csv.DictReader(read_text(table).splitlines())
    if lacking := {"mid", "display_name"} - set(rows.fieldnames or ()):
        raise UserError(f"{table} has no column {', '.join(sorted(lacking))}: get it from {_SITE}")
    return {row["mid"]: row["display_name"] for row in rows}


def _segments(table: Path) -> Iterator[tuple[str, float, str]]:
    """Yield (YTID, start in seconds, "/m/…,/m/…") per line; lines that begin with # are comments."""
    with table.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, skipinitialspace=True)
        try:
            for line in lines:
                if not line or line[0].startswith("#"):
                    continue
                try:
                    ytid, start, end, mids = line
                    start, valid = float(start), -_LONGEST < float(start) < float(end) < _LONGEST
                except ValueError:
                    valid = False
                if not valid or not mids or not _YTID.fullmatch(ytid):
                    shown = ", ".join(line)[:80]
                    raise UserError(
                        f'{table}:{lines.line_num}: {shown!r} is not `YTID, start, end, "labels"` (a comment starts '
                        "with #): repair or remove the line"
                    )
                yield ytid, start, mids
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table}:{lines.line_num + 1}: {error}: get the file from {_SITE}") from error
