"""AudioSet, from its csv files and the audio of its segments."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..audio.waves import SOUNDFILE_SUFFIXES
from ..errors import UserError
from .recordings import Recording, Source, _without_evaluation, printable, read_text

AUDIOSET_CSV = ("balanced_train_segments.csv", "eval_segments.csv", "unbalanced_train_segments.csv")


AUDIOSET_LABELS = "class_labels_indices.csv"


_AUDIOSET_SITE = "https://research.google.com/audioset/download.html"


_AUDIOSET_LICENCE = "the video's own; labels CC-BY-4.0"


# <YTID>.flac, Y<YTID>.wav (PANNs), <YTID>_30.000.wav, <YTID>_30_40.wav, <YTID>_30.0-40.0.wav (audioset-download),
# <YTID>_30000_40000.flac (ms). A YTID always has 11 letters, so that one beginning with Y is not mistaken for a prefix.
_AUDIOSET_FILE = re.compile(r"Y?([\w-]{11})(?:_(\d+(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?", re.ASCII)


_YTID = re.compile(r"[\w-]{11}", re.ASCII)


def audioset_source(path: Path) -> Source:
    """AudioSet: `path` is a folder that holds its csv files and, below it, the audio of its segments, cut; or one csv.

    Of a folder, eval_segments.csv is left out where there are others. Segments without a file are counted (videos are
    deleted), and so are files that belong to no segment. Clips are grouped by video.
    """
    root = path.parent if path.is_file() else path
    files, tables = _audioset_files(root)
    if path.is_file():
        tables[path.name] = path
    names = _audioset_names(tables.pop(AUDIOSET_LABELS, None))
    if not tables:
        raise UserError(f"{path} holds none of {', '.join(AUDIOSET_CSV)}: get them from {_AUDIOSET_SITE}")
    chosen = [path] if path.is_file() else _without_evaluation("audio", [tables[name] for name in sorted(tables)])
    recordings, missing, labels_of = [], 0, {}
    for table in chosen:
        for ytid, start, mids in _segments(table):
            keys = (f"{ytid} {round(start * 1000)}", f"{ytid} {round(start * 1000_000)}", ytid)
            key = next((key for key in keys if key in files), None)
            if key is None:
                missing += 1
                continue
            if (file := files[key]) is None:
                continue  # a segment that two tables list
            files[key] = None
            if mids not in labels_of:
                labels_of[mids] = tuple(names.get(mid.strip(), mid.strip()) for mid in mids.split(","))
            name, suffix = f"audioset-{ytid}-{round(start * 1000)}", file[file.rindex(".") + 1 :].lower()
            inside = printable(file[len(str(root)) + 1 :])
            recordings.append(
                Recording(name, file, "audio", "", labels_of[mids], inside, _AUDIOSET_LICENCE, suffix, group=ytid)
            )
    what = (
        f"{', '.join(table.name for table in chosen)}: {len(recordings)} segments with a file, {missing} lines without"
    )
    if not recordings:
        raise UserError(
            f"{path}: {what}: {', '.join(SOUNDFILE_SUFFIXES)} files named <YTID>, Y<YTID>, <YTID>_<start> or "
            f"<YTID>_<start>_<end> are looked for below {root}"
        )
    others = sum(file is not None for file in files.values())
    print(f"audio: {what}; {others} audio files belong to no segment of these")
    return Source.of(str(path), "audio", recordings)


def _audioset_files(root: Path) -> tuple[dict[str, str | None], dict[str, Path]]:
    """The audio below a folder, by "<YTID>" or "<YTID> <1000 x the number after it>", and AudioSet's csv files."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the one that holds AudioSet's csv files and audio")
    files, tables = {}, {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            stem, dot, suffix = name.rpartition(".")
            if name in AUDIOSET_CSV or name == AUDIOSET_LABELS:
                tables.setdefault(name, Path(folder, name))
            elif f"{dot}{suffix.lower()}" in SOUNDFILE_SUFFIXES and (match := _AUDIOSET_FILE.fullmatch(stem)):
                ytid, start = match.groups()
                key = ytid if start is None else f"{ytid} {round(float(start) * 1000)}"
                files.setdefault(key, f"{folder}/{name}")
    return files, tables


def _audioset_names(table: Path | None) -> dict[str, str]:
    """ "/m/09x0r" -> "Speech"."""
    if table is None:
        print(f"audio: no {AUDIOSET_LABELS}, so labels are codes such as /m/09x0r; get it from {_AUDIOSET_SITE}")
        return {}
    rows = csv.DictReader(read_text(table).splitlines())
    if lacking := {"mid", "display_name"} - set(rows.fieldnames or ()):
        raise UserError(f"{table} has no column {', '.join(sorted(lacking))}: get it from {_AUDIOSET_SITE}")
    return {row["mid"]: row["display_name"] for row in rows}


def _segments(table: Path) -> Iterator[tuple[str, float, str]]:
    """(YTID, start in seconds, "/m/…,/m/…") of each line that is no comment."""
    with table.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, skipinitialspace=True)
        try:
            for line in lines:
                if not line or line[0].startswith("#"):
                    continue
                try:
                    ytid, start, end, mids = line
                    start, right = float(start), float(start) < float(end) < float("inf")
                except ValueError:
                    right = False
                if not right or not mids or not _YTID.fullmatch(ytid):
                    shown = ", ".join(line)[:80]
                    raise UserError(
                        f'{table}:{lines.line_num}: {shown!r} is not `YTID, start, end, "labels"` (a comment starts '
                        "with #): repair or remove the line"
                    )
                yield ytid, start, mids
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table}:{lines.line_num + 1}: {error}: get the file from {_AUDIOSET_SITE}") from error
