"""FoG-A by layer and flow time, as a heat map."""

from typing import TYPE_CHECKING

import numpy as np

from ..config import DOMAINS
from .figure import new_figure
from .labels import UNITS
from .score_table import cell_title, layer_names, scores_by_layer, steps_of, tabulate, times_of, top_k

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_layer_time(rows: list[dict]) -> "Figure":
    """Draw FoG-A at the last step that has times, one panel per domain. Raises ValueError if no step has."""
    table = tabulate(rows)
    steps = [(m, s) for m in ("foga", "foga-vjp") for s in reversed(steps_of(table, m)) if times_of(table, m, s)]
    if not steps:
        raise ValueError(f"no FoG-A at a time among the {len(rows)} rows: nothing for a heat map")
    measure, step = steps[0]
    times, layers = times_of(table, measure, step), layer_names(rows, (measure,))
    domains = sorted({d for m, s, d, t in table if (m, s) == (measure, step) and t in times}, key=DOMAINS.index)
    cells = [[table.get((measure, step, domain, t), {}) for t in times] for domain in domains]
    maps = np.array([[scores_by_layer(cell, layers) for cell in columns] for columns in cells]).swapaxes(1, 2)
    figure = new_figure(max(3.6, 0.45 * len(times)) * len(domains) + 1.4, max(3.4, 0.2 * len(layers) + 1.4))
    panels = figure.subplots(1, len(domains), squeeze=False)[0]
    for axes, scores, columns in zip(panels, maps, cells, strict=True):
        axes.set_facecolor("0.85")  # shows through where a layer was not measured
        image = axes.imshow(scores, aspect="auto", vmin=0, vmax=np.nanmax(maps) + 1e-12, interpolation="nearest")
        best = [(top_k(column, 1) or [np.nan])[0] for column in scores.T]
        axes.scatter(range(len(times)), best, marker="*", s=70, color="white", edgecolor="black", linewidth=0.8)
        axes.set_xticks(range(len(times)), times, fontsize=8)
        axes.set_yticks(range(len(layers)), [f"L{layer}" for layer in layers], fontsize=8 if len(layers) < 40 else 7)
        axes.set_title(cell_title(next(filter(None, columns)), "\n"), fontsize=10)
        axes.set_xlabel("flow time t (0 = noise, 1 = data)")
    panels[0].set_ylabel("layer")
    notes = "★ = highest layer at this t"
    if np.isnan(maps).any():
        notes += "\ngrey = not measured"
    figure.colorbar(image, ax=list(panels), aspect=max(20, len(layers)), label=f"{UNITS[measure]}\n{notes}")
    return figure
