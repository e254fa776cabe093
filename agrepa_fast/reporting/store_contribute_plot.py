"""Store-contribute dissociation: how much each layer contributes to the velocity against how much it stores of the
teacher."""

from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from ..attribution.scores import rank_correlation
from ..config import CONTRIBUTION, DOMAINS, STORAGE
from .figure import new_figure
from .labels import COLOURS, NAMES, STORAGE_MARKERS, UNITS
from .score_table import Cell, cell_label, cell_title, layer_names, scores_by_layer, tabulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_store_contribute(rows: list[dict]) -> tuple["Figure", dict[str, dict[str, float]]]:
    """Draw the last step that has both kinds of measures, one row per domain. Returns the figure, and Spearman's rho of
    the contribution with each storage measure: {domain: {measure: rho}}. Raises ValueError if the rows lack either."""
    table = tabulate(rows)
    stored = {(s, d) for m, s, d, t in table if m in STORAGE and t == "mean"}
    if not stored:
        raise ValueError(f"no storage scores ({', '.join(STORAGE)}) among the {len(rows)} rows")
    both = [(m, s, d) for m in CONTRIBUTION for s, d in sorted(stored, reverse=True) if (m, s, d, "mean") in table]
    if not both:
        raise ValueError(f"no contribution scores ({', '.join(CONTRIBUTION)}) at a step and domain with storage scores")
    measure, step, _ = both[0]
    domains = sorted({d for m, s, d in both if (m, s) == (measure, step)}, key=DOMAINS.index)
    measures = {d: [m for m in STORAGE if (m, step, d, "mean") in table] for d in domains}
    layers = layer_names(rows, {measure}.union(*measures.values()))
    widths = max(5.6, (0.23 if "." in layers[-1] else 0.33) * len(layers)), max(4.6, 0.14 * len(layers))
    figure = new_figure(sum(widths) + 1.8, max(3.9, 0.14 * len(layers) + 1.5) * len(domains))
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    rho, grid = {}, figure.subplots(len(domains), 2, squeeze=False, width_ratios=widths)
    for panels, domain in zip(grid, domains, strict=True):
        cell = table[measure, step, domain, "mean"]
        storage = {m: table[m, step, domain, "mean"] for m in measures[domain]}
        _draw_scores(panels[0], cell, storage, layers)
        error = " ± standard error" if np.isfinite(scores_by_layer(cell, layers, "stderr")).any() else ""
        panels[0].set_title(cell_title(cell, f" as bars{error}, storage as lines\n"), fontsize=10, pad=24)
        rho[domain] = _draw_ranks(panels[1], cell, storage, layers)
        panels[1].set_title(cell_title(cell, " against storage\n"), fontsize=10, pad=24)
    return figure, rho


def _draw_scores(axes: "Axes", cell: Cell, storage: dict[str, Cell], layers: list[str]) -> None:
    """Draw the contribution as bars and the storage measures as lines, with their zeros at the same height."""
    row, places, other = next(iter(cell.values())), range(len(layers)), axes.twinx()
    error = {"yerr": scores_by_layer(cell, layers, "stderr"), "capsize": 2, "error_kw": {"elinewidth": 0.8}}
    axes.bar(places, scores_by_layer(cell, layers), color=COLOURS[row["domain"]], alpha=0.45, **error)
    scores = {m: scores_by_layer(stored, layers) for m, stored in storage.items()}
    for m, stored in storage.items():
        other.plot(places, scores[m], lw=1.2, ms=5, label=cell_label(stored), **STORAGE_MARKERS[m])
    lowest, highest = np.nanmin(list(scores.values())), np.nanmax(list(scores.values()))
    low = min(0.0, lowest)
    high, top = max(-low, highest, 1e-12), axes.get_ylim()[1]
    other.set_ylim(1.08 * low, 1.08 * high)
    axes.set_ylim(top * low / high, top)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places, [f"L{layer}" for layer in layers], fontsize=8, rotation=90 if "." in layers[-1] else 0)
    axes.set(xlim=(-0.7, len(layers) - 0.3), xlabel="layer", ylabel=f"contributes: {UNITS[row['measure']]}")
    other.set_ylabel("stores: score against the teacher")
    other.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)


def _draw_ranks(axes: "Axes", cell: Cell, storage: dict[str, Cell], layers: list[str]) -> dict[str, float]:
    """Draw the rank of each layer by contribution (height) against its ranks by storage, and return Spearman's rho by
    storage measure. A layer has one height, so its name stands once, right of its rightmost marker."""
    from scipy.stats import rankdata

    stored = {m: scores_by_layer(scores, layers) for m, scores in storage.items()}
    measured = np.isfinite(list(stored.values())).any(0)
    contributed = np.where(measured, scores_by_layer(cell, layers), np.nan)
    rho = {m: rank_correlation(contributed.tolist(), scores.tolist()) for m, scores in stored.items()}
    # 1 = highest; equal scores share their mean rank; NaN stays NaN.
    y = rankdata(-contributed, nan_policy="omit")
    x = {m: rankdata(np.where(np.isfinite(contributed), -s, np.nan), nan_policy="omit") for m, s in stored.items()}
    for m in x:
        axes.plot(x[m], y, ls="none", mew=1.3, label=f"{NAMES[m]} $\\rho$ = {rho[m]:.2f}", **STORAGE_MARKERS[m])
    for height in np.unique(y[np.isfinite(y)]):
        tied = np.flatnonzero(y == height)
        at = [place for places in x.values() for place in places[tied] if isfinite(place)]
        name = ", ".join(f"L{layers[i]}" for i in tied[:3])
        if len(tied) > 3:
            name += f" … ({len(tied)} tied)"
        axes.hlines(height, min(at), max(at), color="0.8", linewidth=0.8, zorder=0)
        text = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(name, (min(at), height), (6, 0), bbox={"fc": "white", "ec": "none", "pad": 0.3}, **text)
    count = max(1, int(np.isfinite(y).sum()))
    axes.plot([1, count], [1, count], color="0.6", linestyle=":", linewidth=1, zorder=0)
    axes.set(xlim=(count + 0.8, 0.3 - 0.13 * count), ylim=(count + 0.8, 0.2))
    axes.set(xticks=range(1, count + 1, 1 + count // 13), yticks=range(1, count + 1, 1 + count // 13))
    axes.set(xlabel="rank by storage (1 = stores most)", ylabel="rank by contribution (1 = most)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)
    return rho
