"""`agrepa probe`: measure the layers of a checkpoint, or of any model, and show the result."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..attribution.ablate import ablate
from ..attribution.blocks import find_blocks
from ..attribution.csv import append_csv
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
    opened = open_checkpoint(checkpoint, overrides, live=live)
    out = out or opened.beside("probe" if request.kind == "block" else "probe-branch")
    check_writable(out, "--out")
    try:
        projections, step = load_projections(opened.path), step_of(opened.path)
        measured = measure_model(opened.model, opened.index, opened.config, opened.device, request, projections, step)
    except ValueError as error:
        raise UserError(f"{opened.path}: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    selection = None
    if request.kind == "block":
        try:
            selection = select_as(opened.config.align, measured[0])
            selection.save(out / "selection.json")
        except ValueError as refusal:
            print(f"no ranking: {refusal}")
    _report(measured, selection, out, opened.config.align.k)


def probe_any_model(
    factory: str, blocks: str | None, kind: str, row_arguments: Sequence[str] | None, out: Path
) -> None:
    """FoG-A of an importable model. factory: MODULE:FACTORY, which returns (model, inputs). blocks: the path of its
    blocks. Raises UserError if the model cannot be imported, built or gated."""
    module, _, name = factory.partition(":")
    if not name or blocks is None:
        raise UserError(f"--model {factory}: write MODULE:FACTORY, and --blocks PATH beside it")
    sys.path.insert(0, "")
    try:
        model, inputs = getattr(importlib.import_module(module), name)()
        found = find_blocks(model, blocks)
        rows = row_arguments and [int(argument) if argument.isdigit() else argument for argument in row_arguments]
        scores = ablate(model, inputs, list(found.values()), kind=kind, row_arguments=rows)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--model {factory}: {error}") from error
    _report([scores], None, out, 3)
    print(f"L1 ... L{len(found)} are {', '.join(found)}")


def _report(measured: list[LayerScores], selection: LayerSelection | None, out: Path, k: int) -> None:
    """Write attribution.csv and plots, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    for scores in measured:
        append_csv(out / "attribution.csv", scores)
    plot_all(out / "attribution.csv", measured[0].evidence(), selection, out, k)
    print_tables(measured, selection)
    print(f"wrote {out}: attribution.csv and plots")
