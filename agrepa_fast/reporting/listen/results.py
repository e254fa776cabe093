"""agrepa listen --ratings: opinions and preferences with intervals over listeners and clips."""

import json
import math
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ...evaluation.crossed import crossed_interval
from ...evaluation.intervals import Interval
from ...files import check_writable, read_json, write_atomically
from .material import ANCHOR, TRUTH
from .ratings import Test, preferences, read_answers, read_ratings, scores
from .screening import RULE, screened

RESULTS = "results.json"
_CONFIDENCE = 0.95
_ELSEWHERE = "choose another --out"


class Figure(NamedTuple):
    """A mean over listeners and clips. other: "" for an opinion, the second system of a difference or a preference;
    domain: "all", or one of the clips'."""

    name: str
    other: str
    domain: str
    interval: Interval


class Results(NamedTuple):
    """opinions: mean scores of 1 to 5, of a mos test; compared: differences of two opinions, or the shares of ratings
    that prefer the first. left_out: listener -> reason."""

    test: Test
    listeners: list[str]
    left_out: dict[str, str]
    opinions: list[Figure]
    compared: list[Figure]


def rate(ratings: Path, answers: Path) -> Results:
    """Return the results of the ratings in a folder, for the test of an answers.json. Raises UserError for damaged
    files, and if no listener is left."""
    test = read_answers(answers)
    listeners = read_ratings(ratings, test)
    names = [listener.name for listener in listeners]
    if test.kind == "mos":
        tables = scores(test, listeners)
        against_anchor = tables[TRUTH] - tables[ANCHOR]
        pairs = {pair: tables[pair[0]] - tables[pair[1]] for pair in combinations(test.conditions[:-1], 2)}
    else:
        tables, pairs = {}, preferences(test, listeners)
        against_anchor = pairs[TRUTH, ANCHOR] - 0.5
    left_out = screened(names, against_anchor)
    kept = np.array([name not in left_out for name in names])
    if not kept.any():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"--ratings {ratings}: no listener is left ({reasons})")
    return Results(
        test,
        [name for name in names if name not in left_out],
        left_out,
        [*_figures(test, kept, {(name, ""): table for name, table in tables.items()})],
        [*_figures(test, kept, pairs)],
    )


def _figures(test: Test, kept: np.ndarray, tables: dict[tuple[str, str], np.ndarray]) -> Iterable[Figure]:
    domains = np.array(list(test.clips.values()))
    of_domain = {"all": np.ones(len(domains), bool)} | {
        name: domains == name for name in sorted(set(domains)) if name and len(set(domains)) > 1
    }
    for (name, other), table in tables.items():
        for domain, columns in of_domain.items():
            yield Figure(name, other, domain, crossed_interval(table[kept][:, columns], _CONFIDENCE))


def write_results(results: Results, folder: Path) -> Path:
    """Write results.json into a folder and return its path. Raises UserError if it would replace that of an
    evaluation."""
    path = folder / RESULTS
    before = read_json(path, _ELSEWHERE) if path.exists() else {"test": ""}
    if not isinstance(before, dict) or "test" not in before:
        raise UserError(f"{path} holds other results: {_ELSEWHERE}")
    check_writable(folder, "--out")
    folder.mkdir(parents=True, exist_ok=True)

    def plain(figure: Figure) -> dict:
        interval = {name: None if _is_nan(value) else value for name, value in figure.interval._asdict().items()}
        names = {"system": figure.name} | ({"other": figure.other} if figure.other else {})
        return names | {"domain": figure.domain} | interval

    content = {
        "test": results.test.id,
        "kind": results.test.kind,
        "confidence": _CONFIDENCE,
        "clips": results.test.clips,
        "listeners": results.listeners,
        "left_out": results.left_out,
        "rule": RULE,
        "opinions": [plain(figure) for figure in results.opinions],
        "differences" if results.opinions else "preferences": [plain(figure) for figure in results.compared],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def print_results(results: Results) -> None:
    """Print the tables, with the listeners who are left out and the rule."""
    from rich.console import Console

    console = Console()
    listeners, clips = len(results.listeners), len(results.test.clips)
    console.print(f"{listeners} listeners, {clips} clips, 95 % intervals over both", highlight=False)
    if results.opinions:
        _print_table(console, "mean opinion, 1 to 5", "system", results.opinions)
        _print_table(console, "differences of opinion", "first - second", results.compared, signed=True)
    else:
        _print_table(console, "share that prefers the first; no difference counts half", "pair", results.compared)
    for name, reason in results.left_out.items():
        console.print(f"left out: {name} ({reason})", markup=False, highlight=False)
    console.print(RULE if results.left_out else f"no listener is {RULE}", markup=False, highlight=False)


def _print_table(console, title: str, first: str, figures: list[Figure], *, signed: bool = False) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not figures:
        return
    table = Table(title=title)
    table.add_column(first)
    domains = list(dict.fromkeys(figure.domain for figure in figures))
    for domain in domains:
        n = next(figure.interval.n for figure in figures if figure.domain == domain)
        table.add_column(f"{domain} (N = {n})", justify="right", no_wrap=True)
    sign = " - " if signed else " > "
    for pair in dict.fromkeys((figure.name, figure.other) for figure in figures):
        cells = [_cell(figure.interval, signed) for figure in figures if (figure.name, figure.other) == pair]
        table.add_row(escape(sign.join(filter(None, pair))), *cells)
    console.print(table)


def _cell(interval: Interval, signed: bool) -> str:
    sign = "+" if signed else ""
    bounds = "" if _is_nan(interval.low) else f" [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"
    return f"{interval.value:{sign}.2f}{bounds}".replace("[", "\\[")
