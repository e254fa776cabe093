"""`agrepa probe`: measure the layers of a checkpoint, and show the result."""

from collections.abc import Sequence
from pathlib import Path

from ..attribution.csv import append_csv, read_csv
from ..attribution.scores import LayerScores
from ..attribution.selection import LayerSelection, select_as
from ..checkpoints.find import step_of
from ..checkpoints.weights import load_projections
from ..errors import UserError
from ..files import check_writable
from ..probing.measure import ProbeRequest, measure_model
from .opened import open_checkpoint
from .plots import plot_all
from .tables import print_tables

_FLOW = ("sigma", "reference", "max_reference", "infill")
_PROBE = ("clips", "times", "draws", "chunk", "graph", "storage_clips", "confidence_floor", "undecided")
_USES = ("data", *(f"flow.{name}" for name in _FLOW), *(f"probe.{name}" for name in _PROBE), "align")


def probe_checkpoint(
    checkpoint: Path,
    overrides: Sequence[str],
    request: ProbeRequest,
    *,
    live: bool,
    out: Path | None,
) -> None:
    """Measure a checkpoint's layers on one rank; write attribution.csv, selection.json and plots; print tables. Raises
    UserError if a measurement fails."""
    opened = open_checkpoint(checkpoint, overrides, live=live, uses=_USES)
    out = out or opened.beside("probe" if request.kind == "block" else "probe-branch")
    check_writable(out, "--out")
    read_csv(out / "attribution.csv")  # a file that rows cannot be appended to is refused before the work
    try:
        projections, step = load_projections(opened.path), step_of(opened.path)
        measured = measure_model(opened.model, opened.index, opened.config, opened.device, request, projections, step)
    except ValueError as error:
        raise UserError(f"{opened.path}: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    selection = None
    if request.kind == "block":
        try:
            selection = select_as(opened.config.align, opened.config.probe, measured[0])
            selection.save(out / "selection.json")
            if selection.warning is not None:
                print(f"warning: {selection.warning}")
        except ValueError as refusal:
            print(f"no ranking: {refusal}")
    report(measured, selection, out, opened.config.align.k)


def report(measured: list[LayerScores], selection: LayerSelection | None, out: Path, k: int) -> None:
    """Write attribution.csv and plots, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    for scores in measured:
        append_csv(out / "attribution.csv", scores)
    evidence = measured[0].evidence() if selection is None else selection.evidence
    plot_all(out / "attribution.csv", evidence, selection, out, k)
    print_tables(measured, selection)
    print(f"wrote {out}: attribution.csv and plots")
