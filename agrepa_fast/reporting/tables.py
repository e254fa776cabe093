"""Tables of scores for the terminal."""

from collections.abc import Sequence
from math import isfinite, isnan

from ..attribution.scores import LayerScores
from ..attribution.selection import LayerSelection


def print_tables(measured: Sequence[LayerScores], selection: LayerSelection | None) -> None:
    """Print a table per domain, with a row per layer: each measure ± its standard error, and λ of the selected layers.
    Below it, print the rank correlation of the other measures with the first."""
    from rich.console import Console
    from rich.table import Table

    console, first = Console(), measured[0]
    for domain in first.domains():
        facts = f"{first.clips(domain)} clips, floor {first.floor_of(domain):.1e}, {first.recipe} recipe"
        table = Table(title=f"{domain}: {facts}")
        table.add_column("layer")
        for scores in measured:
            differs = scores.clips(domain) != first.clips(domain)
            header = f"{scores.measure}, {scores.clips(domain)} clips" if differs else scores.measure
            table.add_column(header, justify="right")
        table.add_column("λ", justify="right")
        weights = dict(zip(selection.layers[domain], selection.weights[domain], strict=True)) if selection else {}
        columns = [(scores.mean(domain), scores.stderr(domain)) for scores in measured]
        for layer, name in enumerate(first.layer_names()):
            cells = [_cell(float(mean[layer]), float(stderr[layer])) for mean, stderr in columns]
            table.add_row(name, *cells, f"{weights[layer + 1]:.2f}" if layer + 1 in weights else "")
        console.print(table)
        if len(measured) > 1:
            others = ", ".join(f"{m.measure} {m.rank_correlation(first, domain):.2f}" for m in measured[1:])
            console.print(f"{domain}: rank correlation with {first.measure}: {others}")


def _cell(mean: float, stderr: float) -> str:
    if isnan(mean):
        return "-"
    return f"{mean:.4f} ± {stderr:.4f}" if isfinite(stderr) else f"{mean:.4f}"
