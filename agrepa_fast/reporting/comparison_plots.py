"""Pictures of a comparison: forest plots of differences, and learning curves."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from ..evaluation.compare import Difference
from ..training.metrics import read_metrics
from .figure import new_figure

_STYLES = ("-", "--", ":", "-.")  # of each ten arms
_INK, _ACCENT, _FAINT = "#333333", "#1f77b4", "#b0b0b0"


def plot_forest(found: Sequence[Difference], baseline: str, path: Path) -> None:
    """Draw a metric's differences to the baseline: a dot per seed, a thin bar over seeds, a thick one over clips."""
    figure = new_figure(7, 1.2 + 0.45 * len(found))
    axes = figure.subplots()
    axes.axvline(0, color=_FAINT, linewidth=1)
    for place, one in enumerate(reversed(found)):
        if one.seeds is not None and isfinite(one.seeds.low):
            axes.plot([one.seeds.low, one.seeds.high], [place, place], color=_INK, linewidth=1, zorder=2)
        if one.clips is not None and isfinite(one.clips.low):
            axes.plot([one.clips.low, one.clips.high], [place, place], color=_ACCENT, linewidth=5, alpha=0.35, zorder=1)
        axes.plot(one.of_seeds, [place] * len(one.of_seeds), "o", color=_INK, markersize=4, mfc="white", zorder=3)
        axes.plot([one.value], [place], "D", color=_ACCENT, markersize=6, zorder=4)
    axes.set_yticks(range(len(found)), [f"{one.label} {one.domain}".strip() for one in reversed(found)])
    axes.set_xlabel(f"{found[0].metric}: difference to {baseline} (bar: clips, line: seeds, circles: each seed)")
    axes.set_ylim(-0.6, len(found) - 0.4)
    figure.savefig(path, dpi=110)


def plot_curves(files: Mapping[tuple[str, int], Path], path: Path) -> None:
    """Draw the validation flow losses of all runs, a colour and a style per arm."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    labels = list(dict.fromkeys(label for label, _ in files))
    for (label, _seed), file in files.items():
        if file.is_file() and (points := read_metrics(file).get("val/flow_loss")):
            steps, values = zip(*points, strict=True)
            colour, style = f"C{labels.index(label) % 10}", _STYLES[labels.index(label) // 10 % len(_STYLES)]
            known = label in [line.get_label() for line in axes.lines]
            axes.plot(steps, values, style, color=colour, alpha=0.8, label=None if known else label)
    axes.set_xlabel("optimizer steps of the run")
    axes.set_ylabel("validation flow loss")
    if axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # outside: a dozen arms would cover the curves
    figure.savefig(path, dpi=110)
