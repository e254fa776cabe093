"""The scores that a choice of layers rests on, as bars."""

from typing import TYPE_CHECKING

import numpy as np

from ..attribution.selection import LayerSelection, is_undecided
from .figure import new_figure
from .labels import COLOURS, UNITS, name_with_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_attribution(evidence: dict[str, dict], selection: LayerSelection | None) -> "Figure":
    """Draw the score per layer with error bars, one panel per domain. The bars of aligned layers are filled and
    labelled with their weights; a title in red says that the choice is undecided. evidence: LayerScores.evidence(), or
    that of the selection."""
    names = next(iter(evidence.values()))["layers"]
    depth = len(names)
    figure = new_figure(max(7.0, 0.45 * depth + 2), 2.9 * len(evidence))
    layers = np.arange(1, depth + 1)
    panels = np.atleast_1d(figure.subplots(len(evidence), sharex=True))
    for axes, (domain, measured) in zip(panels, evidence.items(), strict=True):
        mean = np.array([np.nan if score is None else score for score in measured["mean"]])
        stderr = np.array([error or 0.0 for error in measured["stderr"]])
        chosen = selection.layers.get(domain, ()) if selection else ()
        weights = dict(zip(chosen, selection.weights[domain], strict=True)) if chosen else {}
        bars = axes.bar(layers, mean, yerr=stderr, capsize=3, color="white", edgecolor=COLOURS[domain], linewidth=1.4)
        for layer, weight in weights.items():
            bars[layer - 1].set_facecolor(COLOURS[domain])
            top = mean[layer - 1] + stderr[layer - 1]
            axes.annotate(f"λ={weight:.2f}", (layer, top), xytext=(0, 3), textcoords="offset points", ha="center")
        axes.axhline(measured["floor"], color="grey", linestyle=":", linewidth=1)
        axes.set_ylabel(UNITS[measured["measure"]])
        axes.set_ylim(min(0, 1.1 * float(np.nanmin(mean))), 1.18 * float(np.nanmax(mean + stderr)) + 1e-12)
        step = "" if measured["step"] is None else f" at step {measured['step']}"
        axes.set_title(
            f"{domain}: {name_with_recipe(measured['measure'], measured['recipe'])}{step}, {measured['clips']} clips ± "
            f"standard error; filled = aligned{_certainty(measured)}",
            fontsize=10,
            color="firebrick" if is_undecided(measured) else "black",
        )
    panels[-1].set_xticks(layers, names, rotation=90 if max(map(len, names)) > 3 else 0)
    panels[-1].set_xlabel("layer")
    return figure


def _certainty(evidence: dict) -> str:
    """Return a line about how sure a domain's choice is, "" if that is unknown."""
    if evidence.get("top_k_probability") is None:
        return ""
    top, probability = f"Top-{evidence['k']}", evidence["top_k_probability"]
    if is_undecided(evidence):
        return (
            f"\n{top} cannot be told from the next: probability {probability:.2f} < probe.confidence_floor "
            f"{evidence['confidence_floor']:g}"
        )
    if evidence.get("choice") == "soft":
        return f"\nsoft choice: λ by the probability to be in the {top}, which is this one with {probability:.2f}"
    return f"\n{top} with probability {probability:.2f}"
