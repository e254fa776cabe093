"""skipped.csv beside the shards: everything that preparation has seen and not taken, with its reason.

It is written whole, before index.json, from the findings of a domain's stages, so that interruptions and ranks do
not change it. Nothing reads it but its users.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..corpora.recordings import MAX_BAD_SHARE, PassedOver, count_kinds, too_many_bad
from ..errors import UserError
from ..files import write_atomically

FILE = "skipped.csv"
BAD = "bad recording"  # the kind that counts against the 2 %; the others are the nature of a corpus
SHORT, LONG, SILENT = "short recording", "long recording", "silent recording"
UNALIGNED = "recording without phones"
_COLUMNS = ("domain", "corpus", "name", "kind", "reason")
_PRINTED = 20  # recordings of a domain that are printed, too


class LeftOut(NamedTuple):
    """Why a recording is not among the clips."""

    kind: str  # BAD, SHORT, LONG, SILENT or UNALIGNED
    reason: str


def write_skipped(out: Path, domain: str, corpus: str, entries: Iterable[PassedOver]) -> None:
    """Write the rows of a domain into skipped.csv, and keep those of the other domain."""
    path = out / FILE
    rows = [row for row in _read(path) if row[0] != domain]
    rows += [(domain, corpus, *entry) for entry in entries]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(sorted(rows))
    write_atomically(path, text.getvalue())


def _read(path: Path) -> list[tuple[str, ...]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
    except (OSError, ValueError, csv.Error):  # none yet, or somebody else's
        return []
    return [tuple(row) for row in rows if len(row) == len(_COLUMNS)] if tuple(header) == _COLUMNS else []


def print_left_out(out: Path, domain: str, left_out: Sequence[PassedOver]) -> None:
    """Print the first recordings that are left out."""
    for entry in left_out[:_PRINTED]:
        print(f"{domain}: skipped {_named(entry)}")
    if len(left_out) > _PRINTED:
        print(f"{domain}: skipped {len(left_out) - _PRINTED} more, named in {out / FILE}")


def count_line(out: Path, domain: str, corpus: str, entries: Sequence[PassedOver], taken: int) -> str:
    """Return a line with the count of each kind of entries."""
    counts = count_kinds(_plain(entry.kind) for entry in entries)
    where = f"; all names and reasons are in {out / FILE}" if entries else ""
    return f"{domain}: {taken} recordings of {_plain(corpus)} taken; not taken: {counts}{where}"


def check_share(out: Path, domain: str, left_out: Sequence[PassedOver], total: int) -> None:
    """Raise UserError if too many of `total` recordings are bad, or fewer than 2 are left."""
    bad = sum(entry.kind == BAD for entry in left_out)
    if not too_many_bad(bad, total) and total - len(left_out) >= 2:
        return
    if not left_out:
        raise UserError(f"at least 2 {domain} recordings are needed, {total} found: add some")
    worst = sorted(left_out, key=lambda entry: entry.kind != BAD)
    named = f"{', '.join(map(_named, worst[:3]))}{f' and {len(worst) - 3} more' if len(worst) > 3 else ''}"
    raise UserError(
        f"{len(left_out)} of {total} {domain} recordings cannot be used: {named}, all in {out / FILE}; at most "
        f"{MAX_BAD_SHARE:.0%} may be bad (short, long and silent ones are not, nor those without phones) and at least "
        "2 must be good: repair, remove or add some"
    )


def _named(entry: PassedOver) -> str:
    return f"{_plain(entry.name)} ({_plain(entry.reason)})"


def _plain(text: str) -> str:
    """Return a text in one line, without characters that steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
