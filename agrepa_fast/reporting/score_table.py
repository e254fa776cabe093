"""The rows of attribution.csv, as csv.DictReader gives them, arranged for pictures. A layer without a score is NaN."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from math import isfinite

import numpy as np

from ..attribution.scores import rank_correlation
from .labels import count_clips, name_with_recipe

Cell = dict[str, dict]  # layer -> row
Table = dict[tuple[str, int, str, str], Cell]  # by measure, step, domain and t


def tabulate(rows: list[dict]) -> Table:
    """Return the rows with a finite score. If a measure was taken by several recipes, its rows are those of the first
    recipe by name: corrected before official. Raises ValueError if two rows score the same layer."""
    table: Table = {}
    recipes = {row["measure"]: row["recipe"] for row in sorted(rows, key=lambda row: row["recipe"], reverse=True)}
    for row in rows:
        if row["recipe"] == recipes[row["measure"]] and isfinite(float(row["score"])):
            key = (row["measure"], int(row["step"]), row["domain"], row["t"])
            if row["layer"] in table.setdefault(key, {}):
                raise ValueError(f"two scores of layer {row['layer']} at measure, step, domain, t = {key}")
            table[key][row["layer"]] = row
    return table


def layer_names(rows: list[dict], measures: Collection[str]) -> list[str]:
    """Return "1", "2", ... or "1.attn", "1.ffn", "2.attn", ... up to the deepest block of any row, scored or not. The
    parts of blocks are those of the given measures."""
    depth = max(int(row["layer"].partition(".")[0]) for row in rows)
    parts = sorted({row["layer"].partition(".")[2] for row in rows if row["measure"] in measures})
    return [f"{block}.{part}" if part else f"{block}" for block in range(1, depth + 1) for part in parts]


def scores_by_layer(cell: Cell, layers: Sequence[str], column: str = "score") -> np.ndarray:
    """Return a column of one cell, (L,): NaN for a layer without a row, or whose number is empty or infinite."""
    values = np.array([float(cell[layer][column] or "nan") if layer in cell else np.nan for layer in layers])
    return np.where(np.isfinite(values), values, np.nan)


def steps_of(table: Table, measure: str, domain: str | None = None) -> list[int]:
    """Return the steps at which the measure has mean scores, of the domain or of any, in order."""
    return sorted({s for m, s, d, t in table if m == measure and t == "mean" and domain in (None, d)})


def times_of(table: Table, measure: str, step: int) -> list[str]:
    """Return the times at which the measure was taken, in order. A model that was measured at a given input has
    none."""
    times = {t for m, s, _, t in table if (m, s) == (measure, step) and t != "mean" and isfinite(float(t))}
    return sorted(times, key=float)


def top_k(scores: np.ndarray, k: int) -> list[int]:
    """Return the indices of the k highest scores, the highest first. NaN is never among them."""
    return [int(i) for i in np.argsort(-scores, kind="stable") if isfinite(scores[i])][:k]


def compare_probes(series: np.ndarray, k: int) -> tuple[list[float], list[int]]:
    """Compare each probe but the first with the one before it. Returns Spearman's correlations, and how many of the
    Top-k layers stayed in the Top-k. series: (probes, L)."""
    pairs = list(pairwise(series))
    stayed = [len(set(top_k(before, k)) & set(top_k(after, k))) for before, after in pairs]
    return [rank_correlation(before.tolist(), after.tolist()) for before, after in pairs], stayed


def cell_label(cell: Cell) -> str:
    """Return the measure's name and the number of clips."""
    row = next(iter(cell.values()))
    return f"{name_with_recipe(row['measure'], row['recipe'])}, {count_clips(row['clips'])}"


def cell_title(cell: Cell, between: str) -> str:
    """Return "<domain>: <measure><between>at step <step>, <n> clips"."""
    row = next(iter(cell.values()))
    measure = name_with_recipe(row["measure"], row["recipe"])
    return f"{row['domain']}: {measure}{between}at step {row['step']}, {count_clips(row['clips'])}"
