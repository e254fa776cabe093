"""The pictures of a run's or a probe's attribution.csv."""

from math import isnan
from pathlib import Path

from ..attribution.csv import read_csv
from ..attribution.selection import LayerSelection
from ..config import CONTRIBUTION, STORAGE
from .attribution_plot import draw_attribution
from .layer_time_plot import draw_layer_time
from .stability_plot import draw_stability
from .store_contribute_plot import draw_store_contribute

_DPI = 130


def plot_all(table: Path, evidence: dict, selection: LayerSelection | None, folder: Path, k: int) -> dict:
    """Write the pictures that an attribution.csv has the scores for, all of the recipe that the choice of layers rests
    on. Returns the rank correlation of contribution and storage: {domain: {storage measure: Spearman's rho}}, None for
    one that is undefined.

    evidence: LayerScores.evidence() of the choice; without it nothing is written. k: how many layers a Top-k has.
    """
    if not evidence:
        return {}
    draw_attribution(evidence, selection).savefig(folder / "attribution.png", dpi=_DPI)
    recipe = next(iter(evidence.values()))["recipe"]
    rows = [row for row in read_csv(table) if row["recipe"] == recipe or row["measure"] in ("ridge", "cka")]
    contributed, stored = (
        {(row["step"], row["domain"]) for row in rows if row["measure"] in measures}
        for measures in (CONTRIBUTION, STORAGE)
    )
    if contributed:
        draw_stability(rows, k).savefig(folder / "stability.png", dpi=_DPI)
    if any(row["measure"] in ("foga", "foga-vjp") and row["t"] not in ("mean", "nan") for row in rows):
        draw_layer_time(rows).savefig(folder / "layer_time.png", dpi=_DPI)
    if not contributed & stored:
        return {}
    figure, rho = draw_store_contribute(rows)
    figure.savefig(folder / "store_contribute.png", dpi=_DPI)
    return {d: {m: None if isnan(value) else value for m, value in by_measure.items()} for d, by_measure in rho.items()}
