"""The tables of a comparison: layers that were chosen, values, and differences to the baseline."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import NamedTuple

from ..evaluation.compare import ROW, Difference, Evaluated, agreement
from ..evaluation.stored import read_layers


class Comparison(NamedTuple):
    """Runs that were evaluated on the same clips, and their differences to the runs of the label `baseline`. settings:
    what they have in common; failed: names of jobs whose runs are missing."""

    runs: Sequence[Evaluated]
    found: Sequence[Difference]
    baseline: str
    settings: Mapping[str, object]
    failed: Sequence[str]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})


class Grid(NamedTuple):
    """A table of texts, and a sentence below it."""

    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def value_rows(runs: Sequence[Evaluated]) -> list[dict[str, object]]:
    """Return the rows of compare.csv: every value of every run."""
    rows = []
    for run in runs:
        arm = {"strategy": run.label, "seed": run.seed}
        for name, domains in run.results["rows"].items():
            for domain, metrics in domains.items():
                for metric, entry in metrics.items():
                    values = {part: entry[part] for part in ("value", "low", "high", "n")}
                    rows.append({**arm, "row": name, "domain": domain, "metric": metric, **values})
        for domain, loss in run.losses.items():
            rows.append({**arm, "row": ROW, "domain": domain, "metric": "val/flow_loss", "value": loss})
    return rows


def selections(comparison: Comparison) -> Grid:
    """Return the layers that each run aligned, and how far the seeds of a strategy agree."""
    rows, chosen = [], {}
    for run in comparison.runs:
        layers, named = read_layers(run.folder.parent), "none"
        if layers:
            chosen.setdefault(run.label, []).append(layers)
            named = "; ".join(f"{d} {' '.join(f'L{number}' for number in layers[d])}" for d in layers)
        rows.append([run.label, str(run.seed), named])
    agreed = {label: agreement(layers) for label, layers in chosen.items()}
    facts = ", ".join(f"{label} {value:.2f}" for label, value in agreed.items() if value is not None)
    note = f"Agreement of the seeds' layers (Jaccard index): {facts}." if facts else ""
    return Grid(["strategy", "seed", "layers"], rows, note)


def values(comparison: Comparison) -> Grid:
    """Return each strategy's values, means of its seeds, with those of the truth and of the codes."""
    rows = value_rows(comparison.runs)
    kinds = dict.fromkeys((row["domain"], row["metric"]) for row in rows if row["row"] == ROW)
    table, seeds = [], len(comparison.seeds)
    for domain, metric in kinds:
        cells = []
        for row_name, label in [*((ROW, label) for label in comparison.labels), ("truth", None), ("codes", None)]:
            found = [
                row["value"]
                for row in rows
                if (row["row"], row["domain"], row["metric"]) == (row_name, domain, metric)
                and label in (None, row["strategy"])
            ]
            fewer = f" ({len(found)} of {seeds} seeds)" if label and len(found) < seeds else ""
            cells.append(f"{sum(found) / len(found):.3f}{fewer}" if found else "—")
        table.append([domain or "both", metric, *cells])
    return Grid(["domain", "metric", *comparison.labels, "truth", "codes"], table)


def differences_to_baseline(comparison: Comparison) -> Grid:
    """Return the differences with both intervals; ** marks those for which both intervals exclude 0."""
    rows = [
        [
            one.label,
            one.domain or "both",
            one.metric,
            f"{one.value:+.3f}",
            _ends(one.clips),
            _ends(one.seeds),
            "—" if one.p is None else f"{one.p:.3f}",
            "**" if one.clear else "",
        ]
        for one in comparison.found
    ]
    seeds = max((len(one.of_seeds) for one in comparison.found), default=0)  # that both have
    if seeds < 2:
        note = "One seed: the table says nothing of the methods, only of these models."
    else:
        note = (
            f"** both intervals exclude 0. With {seeds} seeds no p-value can be below {2 / 2**seeds:.3f}. A true "
            "difference of half an interval would be seen in about half of such experiments."
        )
    columns = ["strategy", "domain", "metric", "difference", "over clips", "over seeds", "p (Holm)", ""]
    return Grid(columns, rows, note)


def _ends(interval) -> str:
    if interval is None or not isfinite(interval.low):
        return "—"
    return f"[{interval.low:+.3f}, {interval.high:+.3f}]"
