"""The content of a report, and the one file that it is rendered into."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from ...files import write_atomically

LIMIT = 15_000_000  # bytes of a page


class Bar(NamedTuple):
    """A cell of a table with a bar behind its text. share: of the cell's width, from 0 to 1."""

    text: str
    share: float
    strong: bool = False


class Table(NamedTuple):
    """Cells are texts or bars. Columns after the first are numbers, aligned right, unless they are among `texts`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Bar]]
    title: str = ""
    note: str = ""
    texts: Sequence[int] = ()


class Chart(NamedTuple):
    """An SVG picture of draw_lines, and its legend: style and name of each line."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]]


class Picture(NamedTuple):
    """wide: it has the whole width of the page. colours: they stand for values, and a dark page keeps them."""

    title: str
    uri: str
    wide: bool = False
    colours: bool = False


class Version(NamedTuple):
    """A clip as one row of an evaluation has it. notes: figures of this clip, shown below its picture."""

    name: str
    audio: str
    mel: str
    seconds: float
    notes: Sequence[str] = ()


class Clip(NamedTuple):
    """faults: versions that cannot be shown, and why."""

    name: str
    versions: Sequence[Version]
    text: str = ""
    faults: Sequence[str] = ()


class Section(NamedTuple):
    """A part of a report. Its content stands in the order of these fields; folded: a long text, shown on request."""

    title: str
    about: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    clips: Sequence[Clip] = ()
    pictures: Sequence[Picture] = ()
    folded: str = ""


class Document(NamedTuple):
    """A report. facts: the few figures at its top."""

    title: str
    about: str
    facts: Mapping[str, str]
    sections: Sequence[Section]


def write_document(document: Document, path: Path) -> None:
    """Render a report into one html file. Raises UserError if it would be larger than 15 MB."""
    write_page(path, "report.html", document=document)


def write_page(path: Path, template: str, folders: Sequence[str] = ("page",), **values: object) -> None:
    """Render a template of one of the folders beside this one, and write the page. Texts are escaped. Raises UserError
    if it would be larger than 15 MB."""
    import jinja2

    loader = jinja2.FileSystemLoader([Path(__file__).parents[1] / folder for folder in ("page", *folders)])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = environment.get_template(template).render(**values).encode(errors="backslashreplace")
    if len(content) > LIMIT:
        raise UserError(f"{path} would have {len(content) / 1e6:.1f} MB, above {LIMIT / 1e6:.0f}: show fewer clips")
    write_atomically(path, content)
