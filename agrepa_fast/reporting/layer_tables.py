"""The layers of a run with their scores and weights, as tables of its report."""

from collections.abc import Sequence
from math import isfinite

from ..attribution.selection import LayerSelection
from .labels import NAMES, name_with_recipe
from .page.document import Bar, Table


def layer_tables(rows: Sequence[dict], selection: LayerSelection | None) -> list[Table]:
    """Return a table per domain of an attribution.csv: a row per layer, a column per measure, bars for the measure that
    the choice rests on, and the weights λ of the aligned layers. The scores are those of the step of the choice, or the
    last ones before it or after it that a measure has."""
    means = [row for row in rows if row["t"] == "mean" and isfinite(float(row["score"]))]
    step = selection.step if selection else max((int(row["step"]) for row in means), default=0)
    return [
        _table(domain, [row for row in means if row["domain"] == domain], selection, step)
        for domain in dict.fromkeys(row["domain"] for row in means)
    ]


def _table(domain: str, rows: Sequence[dict], selection: LayerSelection | None, step: int) -> Table:
    evidence = (selection.evidence if selection else {}).get(domain, {})
    measured: dict[tuple[str, str], dict[str, dict]] = {}
    for key in dict.fromkeys((row["measure"], row["recipe"]) for row in rows):
        of_measure = [row for row in rows if (row["measure"], row["recipe"]) == key]
        at = min((int(row["step"]) for row in of_measure), key=lambda other: abs(other - step))
        measured[key] = {row["layer"]: row for row in of_measure if int(row["step"]) == at}
    chosen_by = (evidence.get("measure"), evidence.get("recipe"))
    first = chosen_by if chosen_by in measured else next(iter(measured))
    measured = {first: measured.pop(first), **measured}
    chosen = selection.layers.get(domain, ()) if selection else ()
    weights = {str(k): f"{w:.2f}" for k, w in zip(chosen, selection.weights[domain], strict=True)} if chosen else {}
    highest = max(float(row["score"]) for row in measured[first].values())
    cells = []
    for layer in dict.fromkeys(layer for scores in measured.values() for layer in scores):
        row: list[str | Bar] = [f"L{layer}" if layer.isdecimal() else layer]
        for key, scores in measured.items():
            text = _score(scores.get(layer))
            share = float(scores[layer]["score"]) / highest if layer in scores and highest > 0 else 0.0
            row.append(Bar(text, min(1.0, max(0.0, share)), layer in weights) if key == first else text)
        cells.append([*row[:2], weights.get(layer, ""), *row[2:]])
    names = [name_with_recipe(*key) if key[0] in NAMES else key[0] for key in measured]
    columns = ["layer", names[0], "λ", *names[1:]]
    return Table(columns, cells, title=domain, note=_note(measured[first], evidence))


def _score(row: dict | None) -> str:
    if row is None:
        return "—"
    error = f" ± {float(row['stderr']):.4f}" if row["stderr"] and isfinite(float(row["stderr"])) else ""
    return f"{float(row['score']):.4f}{error}"


def _note(scores: dict[str, dict], evidence: dict) -> str:
    row = next(iter(scores.values()))
    parts = [f"step {row['step']}", f"{row['clips']} clips ± standard error", f"floor {float(row['floor']):.1e}"]
    if (probability := evidence.get("top_k_probability")) is not None:
        parts.append(f"Top-{evidence['k']} probability {probability:.2f}")
    return ", ".join(parts)
