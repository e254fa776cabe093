"""report.html of a training run."""

import re
from pathlib import Path

from ..attribution.csv import read_csv
from ..attribution.selection import LayerSelection
from ..files import read_json, read_text
from ..training.metrics import read_metrics
from .clip_rows import Recorded, clips_within_budget, count_shown
from .layer_tables import layer_tables
from .page.chart import draw_lines
from .page.document import Chart, Document, Picture, Section
from .page.media import png_uri

_CLIPS = 12  # at most
_KINDS = ("truth", "codes", "sample")
_PLOTS = {
    "attribution": "Contribution of each layer",
    "stability": "Choices over the run",
    "store_contribute": "What layers contribute and what they store",
    "layer_time": "Contribution over flow time",
}
_WIDE = ("store_contribute",)
_REMEDY = "train the run again"  # its checkpoints are whole


def run_report(folder: Path) -> Document:
    """Return the report of a run's folder whose summary.json has been written. Raises UserError for files that are
    missing or damaged."""
    summary = read_json(folder / "summary.json", _REMEDY)
    selection = _selection(folder)
    sections = [
        _layers(folder, summary, selection),
        Section("Learning curves", charts=_curves(folder, selection)),
        *_clips(folder, summary),
        *_pictures(folder),
        Section("Settings", "config.yaml, as the run resolved it.", folded=read_text(folder / "config.yaml")),
    ]
    about = f"Training run, preset {summary['preset']}, {summary['steps']} steps, {summary['recipe']} recipe."
    return Document(folder.resolve().name, about, _facts(summary), sections)


def _selection(folder: Path) -> LayerSelection | None:
    path = folder / "selection.json"
    return LayerSelection.from_dict(read_json(path, _REMEDY)) if path.is_file() else None


def _facts(summary: dict) -> dict[str, str]:
    losses = summary["val/flow_loss"]
    by_domain, by_time = (
        ", ".join(f"{name} {loss:.3f}" for name, loss in summary.get(f"val/flow_loss_by_{part}", {}).items())
        for part in ("domain", "time")  # runs of version 0.1 have no times
    )
    speed = summary["clips_per_s_median"]
    return {
        "validation flow loss": f"{losses['first']:.3f} → {losses['last']:.3f}",
        "of the averaged weights": f"{losses['ema']:.3f} ({by_domain})",
        "at flow times": by_time or "unknown",
        f"aligned layers ({summary['strategy']})": summary["selection"] or "none",
        "speed": f"{speed:.1f} clips/s",
        "time": f"{summary['seconds_total'] / 60:.1f} min, of which training {summary['seconds']['train'] / 60:.1f}",
        "machine": f"{summary['device']}, {summary['ranks']} rank{'s' if summary['ranks'] > 1 else ''}",
        "computed with": f"{summary['precision']}, ZeRO {summary['zero_stage']}, {summary['backend']} kernels, "
        f"torch {summary['versions']['torch']}",
        "vocoder": summary["vocoder"],
    }


def _layers(folder: Path, summary: dict, selection: LayerSelection | None) -> Section:
    tables = layer_tables(read_csv(folder / "attribution.csv"), selection)
    if selection:
        about = f"Chosen by {summary['strategy']} at step {selection.step}: {selection.describe()}."
        if selection.warning is not None:
            about += f" {selection.warning[0].upper()}{selection.warning[1:]}."
    else:
        about = f"No layers were aligned (align.strategy={summary['strategy']})."
    if correlations := summary["store_contribute_rank_correlation"]:
        of_domain = (
            f"{domain} " + ", ".join(f"{name} {'—' if rho is None else f'{rho:.2f}'}" for name, rho in measures.items())
            for domain, measures in correlations.items()
        )
        about += f" Rank correlation of what layers contribute with what they store: {'; '.join(of_domain)}."
    return Section("Layers", about, tables)


def _curves(folder: Path, selection: LayerSelection | None) -> list[Chart]:
    series = read_metrics(folder / "metrics.jsonl")
    mark = (selection.step, "layers chosen") if selection and selection.step else None

    def lines(names: dict[str, tuple[str, str]]) -> dict:
        """Return the lines that a run has; a loss of 0 is that of steps before it begins."""
        found = {label: (style, [p for p in series.get(name, []) if p[1]]) for name, (label, style) in names.items()}
        return {label: line for label, line in found.items() if line[1]}

    flow = {
        "train/flow_loss": ("train", "thin"),
        "val/flow_loss": ("validation", "strong"),
        "val/flow_loss_speech": ("validation, speech", "dashed"),
        "val/flow_loss_audio": ("validation, audio", "dotted"),
    }
    align = {"train/align_loss": ("alignment", "strong"), "train/bitc_loss": ("BiT-C", "thin")}
    charts = [draw_lines("Flow loss", "optimizer step", lines(flow), mark)]
    if others := lines(align):
        charts.append(draw_lines("Alignment losses", "optimizer step", others, mark))
    return charts


def _clips(folder: Path, summary: dict) -> list[Section]:
    """Return the section of the wavs <domain>-<n>-<kind>.wav; none if the run has written none."""
    names: dict[str, dict[str, Path]] = {}
    for file in summary["samples"]:
        if found := re.fullmatch(rf"(.+)-({'|'.join(_KINDS)})\.wav", file):
            names.setdefault(found[1], {})[found[2]] = folder / "samples" / file
    recorded = [
        Recorded(name, {kind: files[kind] for kind in _KINDS if kind in files}) for name, files in names.items()
    ]
    if not recorded:
        return []
    clips = clips_within_budget(recorded, _CLIPS)
    about = f"Validation clips through {summary['vocoder']}: truths, and samples of the averaged weights"
    if any("codes" in one.files for one in recorded):
        about += "; codes: the mean mel of each token, all that tokens alone say"
    return [Section("Clips", f"{about}.{count_shown(clips, recorded)}", clips=clips)]


def _pictures(folder: Path) -> list[Section]:
    paths = {title: folder / "plots" / f"{name}.png" for name, title in _PLOTS.items()}
    pictures = [
        Picture(title, png_uri(path), wide=path.stem in _WIDE, colours=path.stem == "layer_time")
        for title, path in paths.items()
        if path.is_file() and path.stat().st_size
    ]
    return [Section("Plots", pictures=pictures)] if pictures else []
