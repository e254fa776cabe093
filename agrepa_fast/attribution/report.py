"""What is written about attribution: attribution.csv (one schema) and the picture of which layers were aligned and
why."""

import csv
from pathlib import Path

from .scores import LayerScores
from .selection import LayerSelection

COLUMNS = ("step", "measure", "recipe", "domain", "layer", "t", "score", "stderr", "floor", "clips")
COLOURS = {"speech": "#1f77b4", "audio": "#ff7f0e"}


def csv_rows(scores: LayerScores, step: int) -> list[dict]:
    """One row per domain and layer with t = mean (standard error over clips), and one per time."""
    rows = []
    for domain in scores.domains():
        common = {
            "step": step,
            "measure": "foga",
            "recipe": scores.recipe,
            "domain": domain,
            "floor": f"{scores.floor_of(domain):.3e}",
            "clips": scores.clips(domain),
        }
        mean, stderr, at = scores.mean(domain), scores.stderr(domain), scores.mean_at(domain)
        for layer in range(scores.depth):
            row = {"layer": layer + 1, "t": "mean", "score": f"{mean[layer]:.6g}", "stderr": f"{stderr[layer]:.3g}"}
            rows.append(common | row)
            rows += [
                common | {"layer": layer + 1, "t": f"{t:g}", "score": f"{at[layer, i]:.6g}", "stderr": ""}
                for i, t in enumerate(scores.times)
            ]
    return rows


def append_csv(path: Path, scores: LayerScores, step: int) -> None:
    """Append one probe to attribution.csv; a step that is there already (a resumed run probes it again) is replaced."""
    rows = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
    rows += csv_rows(scores, step)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def print_table(evidence: dict[str, dict], selection: LayerSelection | None) -> None:
    """A row a layer: FoG-A with its standard error, and lambda of the selected layers, for every domain."""
    from rich.console import Console
    from rich.table import Table

    domains = list(evidence)
    title = ", ".join(
        f"{name}: {measured['clips']} clips, floor {measured['floor']:.1e}" for name, measured in evidence.items()
    )
    recipe = next(iter(evidence.values()))["recipe"]
    table = Table(title=f"FoG-A, {recipe} recipe ({title})")
    table.add_column("layer")
    for domain in domains:
        table.add_column(domain, justify="right")
        table.add_column("λ", justify="right")
    for layer in range(1, len(evidence[domains[0]]["mean"]) + 1):
        cells = []
        for domain in domains:
            error = evidence[domain]["stderr"][layer - 1]
            cells.append(
                f"{evidence[domain]['mean'][layer - 1]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            )
            chosen = selection.layers[domain] if selection else ()
            cells.append(f"{selection.weights[domain][chosen.index(layer)]:.2f}" if layer in chosen else "")
        table.add_row(f"L{layer}", *cells)
    Console().print(table)


def plot_attribution(evidence: dict[str, dict], selection: LayerSelection | None, path: Path) -> None:
    """Contribution per layer with error bars, a panel a domain; aligned layers are filled and labelled with their
    weights.

    evidence: LayerScores.evidence().
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depth = len(next(iter(evidence.values()))["mean"])
    figure = Figure(figsize=(max(7.0, 0.45 * depth + 2), 2.9 * len(evidence)), layout="constrained")
    FigureCanvasAgg(figure)
    layers = np.arange(1, depth + 1)
    panels = np.atleast_1d(figure.subplots(len(evidence), sharex=True))
    for axes, (domain, measured) in zip(panels, evidence.items(), strict=True):
        mean = np.array(measured["mean"])
        stderr = np.array([error or 0.0 for error in measured["stderr"]])
        chosen = selection.layers.get(domain, ()) if selection else ()
        weights = dict(zip(chosen, selection.weights[domain], strict=True)) if chosen else {}
        bars = axes.bar(layers, mean, yerr=stderr, capsize=3, color="white", edgecolor=COLOURS[domain], linewidth=1.4)
        for layer, weight in weights.items():
            bars[layer - 1].set_facecolor(COLOURS[domain])
            top = mean[layer - 1] + stderr[layer - 1]
            axes.annotate(f"λ={weight:.2f}", (layer, top), xytext=(0, 3), textcoords="offset points", ha="center")
        axes.axhline(measured["floor"], color="grey", linestyle=":", linewidth=1)
        axes.set_ylabel("relative velocity change")
        axes.set_ylim(0, 1.18 * float((mean + stderr).max()) + 1e-12)
        step = "" if measured["step"] is None else f" at step {measured['step']}"
        recipe = "" if measured["recipe"] == "corrected" else f" ({measured['recipe']} recipe)"
        axes.set_title(
            f"{domain}: FoG-A{recipe}{step}, {measured['clips']} clips ± standard error; filled = aligned", fontsize=10
        )
    panels[-1].set_xticks(layers, [f"L{layer}" for layer in layers])
    panels[-1].set_xlabel("layer")
    figure.savefig(path, dpi=130)
