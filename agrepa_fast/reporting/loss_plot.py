"""The loss curves of a run."""

from pathlib import Path

from ..training.metrics import read_metrics
from .figure import new_figure


def plot_loss(metrics: Path, path: Path, selection_step: int | None = None) -> None:
    """Draw the flow losses of training and validation and the alignment losses of a metrics.jsonl into `path`.
    selection_step: marked as the step at which the layers were chosen."""
    series = read_metrics(metrics)
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.plot(*zip(*series["train/flow_loss"], strict=True), color="#9ecae1", linewidth=1, label="train flow loss")
    axes.plot(
        *zip(*series["val/flow_loss"], strict=True), color="#08519c", marker="o", markersize=3, label="validation"
    )
    for domain, style in (("speech", "--"), ("audio", ":")):
        if points := series.get(f"val/flow_loss_{domain}"):
            axes.plot(
                *zip(*points, strict=True), color="#08519c", linestyle=style, linewidth=1, label=f"validation, {domain}"
            )
    for name, colour, label in (("align", "#e6550d", "alignment loss"), ("bitc", "#fdae6b", "BiT-C loss")):
        if points := [(step, value) for step, value in series[f"train/{name}_loss"] if value > 0]:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=label)
    if selection_step:
        axes.axvline(selection_step, color="grey", linewidth=1, linestyle=":")
        axes.annotate(
            "layers chosen", (selection_step, axes.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
