"""Pictures of attribution.csv: layers over time, layers over training, and what is stored against what contributes.

All take the rows as csv.DictReader gives them. A layer without a score is a gap everywhere, never a zero.
"""

from collections.abc import Collection, Sequence
from itertools import cycle, pairwise
from math import isfinite
from pathlib import Path

import numpy as np

from ..attribution.csv import COLOURS, NAMES, UNITS, read_csv
from ..attribution.scores import rank_correlation
from ..attribution.selection import LayerSelection
from ..config import CONTRIBUTION, DOMAINS, STORAGE

STORED = {  # Okabe-Ito, none of them a domain's
    "lasp": {"color": "#000000", "marker": "o", "mfc": "none"},
    "ridge": {"color": "#009E73", "marker": "s", "mfc": "none"},
    "cka": {"color": "#CC79A7", "marker": "^", "mfc": "none"},
}
Cell = dict[str, dict]  # layer -> row
Table = dict[tuple[str, int, str, str], Cell]  # by measure, step, domain, t


def tabulate(rows: list[dict]) -> Table:
    """The rows with a finite score; where several recipes took a measure, those of the first by name: corrected before
    official. Raises ValueError when two of them score the same layer."""
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
    """ "1", "2", ... or "1.attn", "1.ffn", "2.attn", ..., scored or not, up to the deepest block of any row."""
    depth = max(int(row["layer"].partition(".")[0]) for row in rows)
    parts = sorted({row["layer"].partition(".")[2] for row in rows if row["measure"] in measures})
    return [f"{block}.{part}" if part else f"{block}" for block in range(1, depth + 1) for part in parts]


def in_order(cell: Cell, layers: Sequence[str], column: str = "score") -> np.ndarray:
    """(L,) of one cell of the table, nan for a layer that is not there or whose number is empty or infinite."""
    values = np.array([float(cell[layer][column] or "nan") if layer in cell else np.nan for layer in layers])
    return np.where(np.isfinite(values), values, np.nan)


def steps_of(table: Table, measure: str, domain: str | None = None) -> list[int]:
    """Steps, in order, at which the measure has mean scores (of the domain)."""
    return sorted({s for m, s, d, t in table if m == measure and t == "mean" and domain in (None, d)})


def times_of(table: Table, measure: str, step: int) -> list[str]:
    """Times, in order, at which the measure was taken; none for a model that was measured at a given input."""
    times = {t for m, s, _, t in table if (m, s) == (measure, step) and t != "mean" and isfinite(float(t))}
    return sorted(times, key=float)


def top_k(scores: np.ndarray, k: int) -> list[int]:
    """Indices of the k highest scores, the highest first; gaps are never among them."""
    return [int(i) for i in np.argsort(-scores, kind="stable") if isfinite(scores[i])][:k]


def changes(series: np.ndarray, k: int) -> tuple[list[float], list[int]]:
    """series (probes, L): of each probe but the first, Spearman's correlation with the one before, and how many of that
    one's Top-k are among its own."""
    pairs = list(pairwise(series))
    kept = [len(set(top_k(before, k)) & set(top_k(after, k))) for before, after in pairs]
    return [rank_correlation(before.tolist(), after.tolist()) for before, after in pairs], kept


def plot_all(table: Path, evidence: dict, selection: LayerSelection | None, folder: Path, k: int) -> dict:
    """The pictures of an attribution.csv, and of the choice that rests on `evidence` (LayerScores.evidence(), {} for
    none), whose recipe they show. Returns the rank correlation of what layers store with what they contribute: domain
    -> storage measure -> Spearman's rho, None where there is none."""
    if not evidence:
        return {}
    plot_attribution(evidence, selection, folder / "attribution.png")
    recipe = next(iter(evidence.values()))["recipe"]
    rows = [row for row in read_csv(table) if row["recipe"] == recipe or row["measure"] in ("ridge", "cka")]
    contributed, stored = (
        {(row["step"], row["domain"]) for row in rows if row["measure"] in measures}
        for measures in (CONTRIBUTION, STORAGE)
    )
    if contributed:
        plot_stability(rows, folder / "stability.png", k)
    if any(row["measure"] in ("foga", "foga-vjp") and row["t"] not in ("mean", "nan") for row in rows):
        plot_layer_time(rows, folder / "layer_time.png")
    if not contributed & stored:
        return {}
    found = plot_store_contribute(rows, folder / "store_contribute.png")
    return {domain: {m: None if rho != rho else rho for m, rho in rhos.items()} for domain, rhos in found.items()}


def plot_attribution(evidence: dict[str, dict], selection: LayerSelection | None, path: Path) -> None:
    """Contribution per layer with error bars, a panel a domain; aligned layers are filled and labelled with their
    weights.

    evidence: LayerScores.evidence().
    """
    names = next(iter(evidence.values()))["layers"]
    depth = len(names)
    figure = _new_figure(max(7.0, 0.45 * depth + 2), 2.9 * len(evidence))
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
        recipe = "" if measured["recipe"] == "corrected" else f" ({measured['recipe']} recipe)"
        axes.set_title(
            f"{domain}: {NAMES[measured['measure']]}{recipe}{step}, {measured['clips']} clips ± standard error; "
            "filled = aligned",
            fontsize=10,
        )
    panels[-1].set_xticks(layers, names, rotation=90 if max(map(len, names)) > 3 else 0)
    panels[-1].set_xlabel("layer")
    figure.savefig(path, dpi=130)


def plot_layer_time(rows: list[dict], path: Path) -> None:
    """FoG-A, layer x time, at the last step that has times, a panel a domain. Raises ValueError when none has."""
    _layer_time(rows).savefig(path, dpi=130)


def plot_stability(rows: list[dict], path: Path, k: int) -> None:
    """Every layer over training, and how far each probe agrees with the one before. Raises ValueError without any."""
    _stability(rows, k).savefig(path, dpi=130)


def plot_store_contribute(rows: list[dict], path: Path) -> dict[str, dict[str, float]]:
    """Store-contribute dissociation at the last step that has both, a row a domain. Returns Spearman's rho of the
    contribution with each storage measure, {domain: {measure: rho}}. Raises ValueError when the rows lack either."""
    figure, rho = _store_contribute(rows)
    figure.savefig(path, dpi=130)
    return rho


def _new_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _measured(cell: Cell) -> tuple[str, str]:
    row = next(iter(cell.values()))
    recipe = "" if row["recipe"] == "corrected" else f" ({row['recipe']} recipe)"
    return NAMES[row["measure"]] + recipe, f"{row['clips']} clip" + "s" * (row["clips"] != "1")


def _title(cell: Cell, between: str) -> str:
    row, (name, clips) = next(iter(cell.values())), _measured(cell)
    return f"{row['domain']}: {name}{between}at step {row['step']}, {clips}"


def _layer_time(rows: list[dict]):
    table = tabulate(rows)
    found = [(m, s) for m in CONTRIBUTION[:2] for s in reversed(steps_of(table, m)) if times_of(table, m, s)]
    if not found:
        raise ValueError(f"no FoG-A at a time among the {len(rows)} rows: nothing for a heat map")
    measure, step = found[0]
    times, layers = times_of(table, measure, step), layer_names(rows, (measure,))
    domains = sorted({d for m, s, d, t in table if (m, s) == (measure, step) and t in times}, key=DOMAINS.index)
    cells = [[table.get((measure, step, domain, t), {}) for t in times] for domain in domains]
    maps = np.array([[in_order(cell, layers) for cell in columns] for columns in cells]).swapaxes(1, 2)
    figure = _new_figure(max(3.6, 0.45 * len(times)) * len(domains) + 1.4, max(3.4, 0.2 * len(layers) + 1.4))
    panels = figure.subplots(1, len(domains), squeeze=False)[0]
    for axes, scores, columns in zip(panels, maps, cells, strict=True):
        axes.set_facecolor("0.85")  # what shows through a gap
        image = axes.imshow(scores, aspect="auto", vmin=0, vmax=np.nanmax(maps) + 1e-12, interpolation="nearest")
        best = [(top_k(column, 1) or [np.nan])[0] for column in scores.T]
        axes.scatter(range(len(times)), best, marker="*", s=70, color="white", edgecolor="black", linewidth=0.8)
        axes.set_xticks(range(len(times)), times, fontsize=8)
        axes.set_yticks(range(len(layers)), [f"L{layer}" for layer in layers], fontsize=8 if len(layers) < 40 else 7)
        axes.set_title(_title(next(filter(None, columns)), "\n"), fontsize=10)
        axes.set_xlabel("flow time t (0 = noise, 1 = data)")
    panels[0].set_ylabel("layer")
    notes = "★ = highest layer at this t" + "\ngrey = not measured" * bool(np.isnan(maps).any())
    figure.colorbar(image, ax=list(panels), aspect=max(20, len(layers)), label=f"{UNITS[measure]}\n{notes}")
    return figure


def _stability(rows: list[dict], k: int):
    table = tabulate(rows)
    # What chose the layers was measured most often; FoG-A is measured at the end of every run.
    measure = max((*CONTRIBUTION, "lasp"), key=lambda m: len(steps_of(table, m)))
    if not steps_of(table, measure):
        raise ValueError(f"no contribution scores ({', '.join(CONTRIBUTION)}) among the {len(rows)} rows")
    layers = layer_names(rows, (measure,))
    domains = sorted({d for m, _, d, t in table if (m, t) == (measure, "mean")}, key=DOMAINS.index)
    figure = _new_figure(max(7.0, 5.6 * len(domains)), 7.5)
    columns = figure.subplots(3, len(domains), sharex="col", squeeze=False, height_ratios=(3.4, 1, 1)).T
    for (lines, *below), domain in zip(columns, domains, strict=True):
        steps = steps_of(table, measure, domain)
        series = np.stack([in_order(table[measure, step, domain, "mean"], layers) for step in steps])
        best, few = top_k(series[-1], k), len(steps) < 40
        low, high = min(0.0, np.nanmin(series)), 1.05 * np.nanmax(series) + 1e-12
        lines.plot(steps, series, color="0.75", linewidth=0.8, marker=".", markersize=5 if few else 1)
        bold, place = {"color": COLOURS[domain], "marker": "." if few else ""}, np.inf
        for layer, style in zip(best, cycle(("-", "--", "-.", ":")), strict=False):
            lines.plot(steps, series[:, layer], linewidth=2.2, linestyle=style, **bold)
            place = min((series[-1, layer] - low) / (high - low), place - 0.05)  # close labels move down
            leader = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.7}
            text = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "arrowprops": leader}
            lines.annotate(f"L{layers[layer]}", (steps[-1], series[-1, layer]), (1.03, place), **text)
        last = table[measure, steps[-1], domain, "mean"]
        lines.set_title(_title(last, f" over training\nbold = Top-{k} of the last probe, "), fontsize=10)
        lines.set_ylim(low, high)
        for axes, values, top in zip(below, changes(series, k), (1, k), strict=True):
            axes.plot(steps[1:], values, linewidth=1.2, **bold)
            axes.set_ylim(min([0.0, *values]) - 0.08 * top, 1.08 * top)
            axes.yaxis.get_major_locator().set_params(nbins=4, integer=axes is below[1])
            if len(steps) == 1:
                axes.text(0.5, 0.5, "one probe: nothing to compare", ha="center", va="center", transform=axes.transAxes)
                axes.set_xticks(steps)
        below[1].set_xlabel("training step")
    names = (UNITS[measure], "Spearman's $\\rho$\nwith the probe\nbefore", f"stayed in\nthe Top-{k}")
    for axes, name in zip(columns[0], names, strict=True):
        axes.set_ylabel(name)
    return figure


def _store_contribute(rows: list[dict]):
    table = tabulate(rows)
    stored = {(s, d) for m, s, d, t in table if m in STORAGE and t == "mean"}
    if not stored:
        raise ValueError(f"no storage scores ({', '.join(STORAGE)}) among the {len(rows)} rows")
    both = [(m, s, d) for m in CONTRIBUTION for s, d in sorted(stored, reverse=True) if (m, s, d, "mean") in table]
    if not both:
        raise ValueError(f"no contribution scores ({', '.join(CONTRIBUTION)}) at a step and domain with storage scores")
    measure, step, _ = both[0]
    domains = sorted({d for m, s, d in both if (m, s) == (measure, step)}, key=DOMAINS.index)
    found = {d: [m for m in STORAGE if (m, step, d, "mean") in table] for d in domains}
    layers = layer_names(rows, {measure}.union(*found.values()))
    widths = max(5.6, (0.23 if "." in layers[-1] else 0.33) * len(layers)), max(4.6, 0.14 * len(layers))
    figure = _new_figure(sum(widths) + 1.8, max(3.9, 0.14 * len(layers) + 1.5) * len(domains))
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    rho, grid = {}, figure.subplots(len(domains), 2, squeeze=False, width_ratios=widths)
    for panels, domain in zip(grid, domains, strict=True):
        cell, storage = table[measure, step, domain, "mean"], {m: table[m, step, domain, "mean"] for m in found[domain]}
        _draw_scores(panels[0], cell, storage, layers)
        error = " ± standard error" * bool(np.isfinite(in_order(cell, layers, "stderr")).any())
        panels[0].set_title(_title(cell, f" as bars{error}, storage as lines\n"), fontsize=10, pad=24)
        rho[domain] = _draw_ranks(panels[1], cell, storage, layers)
        panels[1].set_title(_title(cell, " against storage\n"), fontsize=10, pad=24)
    return figure, rho


def _draw_scores(axes, cell: Cell, storage: dict[str, Cell], layers: list[str]) -> None:
    row, places, other = next(iter(cell.values())), range(len(layers)), axes.twinx()
    error = {"yerr": in_order(cell, layers, "stderr"), "capsize": 2, "error_kw": {"elinewidth": 0.8}}
    axes.bar(places, in_order(cell, layers), color=COLOURS[row["domain"]], alpha=0.45, **error)
    for m, stored in storage.items():
        other.plot(places, in_order(stored, layers), lw=1.2, ms=5, label=", ".join(_measured(stored)), **STORED[m])
    scores = [in_order(stored, layers) for stored in storage.values()]
    low = min(0.0, np.nanmin(scores))
    high, top = max(-low, np.nanmax(scores), 1e-12), axes.get_ylim()[1]
    other.set_ylim(1.08 * low, 1.08 * high)
    axes.set_ylim(top * low / high, top)  # both axes have their zero at the same height
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places, [f"L{layer}" for layer in layers], fontsize=8, rotation=90 if "." in layers[-1] else 0)
    axes.set(xlim=(-0.7, len(layers) - 0.3), xlabel="layer", ylabel=f"contributes: {UNITS[row['measure']]}")
    other.set_ylabel("stores: score against the teacher")
    other.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)


def _draw_ranks(axes, cell: Cell, storage: dict[str, Cell], layers: list[str]) -> dict[str, float]:
    """A layer has one height, so its name stands once, right of its rightmost marker, where no other layer is."""
    from scipy.stats import rankdata

    stored = {m: in_order(scores, layers) for m, scores in storage.items()}
    given = np.where(np.isfinite(list(stored.values())).any(0), in_order(cell, layers), np.nan)
    rho = {m: rank_correlation(given.tolist(), scores.tolist()) for m, scores in stored.items()}
    y = rankdata(-given, nan_policy="omit")  # 1 = highest; equal scores share their mean rank; nan stays nan
    x = {m: rankdata(np.where(np.isfinite(given), -scores, np.nan), nan_policy="omit") for m, scores in stored.items()}
    for m in x:
        axes.plot(x[m], y, ls="none", mew=1.3, label=f"{NAMES[m]} $\\rho$ = {rho[m]:.2f}", **STORED[m])
    for height in np.unique(y[np.isfinite(y)]):
        tied = np.flatnonzero(y == height)
        at = [place for places in x.values() for place in places[tied] if isfinite(place)]
        name = ", ".join(f"L{layers[i]}" for i in tied[:3]) + f" … ({len(tied)} tied)" * (len(tied) > 3)
        axes.hlines(height, min(at), max(at), color="0.8", linewidth=0.8, zorder=0)
        text = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(name, (min(at), height), (6, 0), bbox={"fc": "white", "ec": "none", "pad": 0.3}, **text)
    count = max(1, int(np.isfinite(y).sum()))
    axes.plot([1, count], [1, count], color="0.6", linestyle=":", linewidth=1, zorder=0)
    axes.set(xlim=(count + 0.8, 0.3 - 0.13 * count), ylim=(count + 0.8, 0.2))
    axes.set(xticks=range(1, count + 1, 1 + count // 13), yticks=range(1, count + 1, 1 + count // 13))
    axes.set(xlabel="rank by storage (1 = stores most)", ylabel="rank by contribution (1 = most)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)
    return rho
