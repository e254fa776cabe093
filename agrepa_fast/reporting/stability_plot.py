"""The scores of every layer over training, and how far each probe agrees with the one before it."""

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from ..config import CONTRIBUTION, DOMAINS
from .figure import new_figure
from .labels import COLOURS, UNITS
from .score_table import cell_title, compare_probes, layer_names, scores_by_layer, steps_of, tabulate, top_k

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_stability(rows: list[dict], k: int) -> "Figure":
    """Draw the measure that was taken most often, one column per domain. Raises ValueError if the rows have none."""
    table = tabulate(rows)
    # The measure that chose the layers was taken most often; FoG-A is taken at the end of every run, too.
    measure = max((*CONTRIBUTION, "lasp"), key=lambda m: len(steps_of(table, m)))
    if not steps_of(table, measure):
        raise ValueError(f"no contribution scores ({', '.join(CONTRIBUTION)}) among the {len(rows)} rows")
    layers = layer_names(rows, (measure,))
    domains = sorted({d for m, _, d, t in table if (m, t) == (measure, "mean")}, key=DOMAINS.index)
    figure = new_figure(max(7.0, 5.6 * len(domains)), 7.5)
    columns = figure.subplots(3, len(domains), sharex="col", squeeze=False, height_ratios=(3.4, 1, 1)).T
    for (lines, *below), domain in zip(columns, domains, strict=True):
        steps = steps_of(table, measure, domain)
        series = np.stack([scores_by_layer(table[measure, step, domain, "mean"], layers) for step in steps])
        style = {"color": COLOURS[domain], "marker": "." if len(steps) < 40 else ""}
        _draw_layers(lines, steps, series, layers, top_k(series[-1], k), style)
        last = table[measure, steps[-1], domain, "mean"]
        lines.set_title(cell_title(last, f" over training\nbold = Top-{k} of the last probe, "), fontsize=10)
        for axes, values, top in zip(below, compare_probes(series, k), (1, k), strict=True):
            axes.plot(steps[1:], values, linewidth=1.2, **style)
            axes.set_ylim(min([0.0, *values]) - 0.08 * top, 1.08 * top)
            axes.yaxis.get_major_locator().set_params(nbins=4, integer=axes is below[1])
            if len(steps) == 1:
                axes.text(0.5, 0.5, "one probe: nothing to compare", ha="center", va="center", transform=axes.transAxes)
                axes.set_xticks(steps)
        below[1].set_xlabel("training step")
    names = (UNITS[measure], "Spearman's $\\rho$\nwith the probe\nbefore", f"stayed in\nthe Top-{k}")
    for axes, name in zip(columns[0], names, strict=True):
        axes.set_ylabel(name)
    return figure


def _draw_layers(axes: "Axes", steps: list[int], series: np.ndarray, layers: list[str], best: list[int], style: dict):
    """Draw a grey line per layer, and bold, labelled ones for the best."""
    low, high = min(0.0, np.nanmin(series)), 1.05 * np.nanmax(series) + 1e-12
    axes.plot(steps, series, color="0.75", linewidth=0.8, marker=".", markersize=5 if len(steps) < 40 else 1)
    label_height = np.inf
    for layer, dashes in zip(best, cycle(("-", "--", "-.", ":")), strict=False):
        axes.plot(steps, series[:, layer], linewidth=2.2, linestyle=dashes, **style)
        label_height = min((series[-1, layer] - low) / (high - low), label_height - 0.05)  # close labels move down
        leader = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.7}
        text = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "arrowprops": leader}
        axes.annotate(f"L{layers[layer]}", (steps[-1], series[-1, layer]), (1.03, label_height), **text)
    axes.set_ylim(low, high)
