"""attribution.csv: one schema for the scores of all measures."""

import csv
import io
import math
from pathlib import Path

from ..errors import UserError
from ..files import read_text, write_atomically
from .scores import LayerScores

COLUMNS = ("step", "measure", "recipe", "domain", "layer", "t", "score", "stderr", "floor", "clips")


def csv_rows(scores: LayerScores) -> list[dict]:
    """Return the rows of a probe: per domain and measured layer one with t = mean and its standard error over clips,
    and one per time."""
    rows = []
    for domain in scores.domains():
        common = {
            "step": scores.step or 0,
            "measure": scores.measure,
            "recipe": scores.recipe,
            "domain": domain,
            "floor": f"{scores.floor_of(domain):.3e}",
            "clips": scores.clips(domain),
        }
        mean, stderr, at = scores.mean(domain), scores.stderr(domain), scores.mean_at(domain)
        for layer, name in enumerate(scores.layer_names()):
            if mean[layer].isnan():
                continue
            of_layer = common | {"layer": name.removeprefix("L")}
            rows.append(of_layer | {"t": "mean", "score": f"{mean[layer]:.6g}", "stderr": f"{stderr[layer]:.3g}"})
            rows += [
                of_layer | {"t": f"{t:g}", "score": f"{at[layer, i]:.6g}", "stderr": ""}
                for i, t in enumerate(scores.times)
                if not math.isnan(t)
            ]
    return rows


def read_csv(path: Path) -> list[dict]:
    """Return the rows of an attribution.csv, [] if it does not exist. Raises UserError for a file of another kind."""
    if not path.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        whole = all(row.keys() == set(COLUMNS) and None not in row.values() for row in rows)
        for row in rows if whole else ():
            int(row["step"]), float(row["score"])
    except (ValueError, csv.Error):
        whole = False
    if not whole:
        raise UserError(f"{path} is no attribution.csv of this version: move it away, or choose another folder")
    return rows


def append_csv(path: Path, scores: LayerScores) -> None:
    """Append a probe to attribution.csv. It replaces the rows of the same measure and recipe at its step."""
    probe = (str(scores.step or 0), scores.measure, scores.recipe)
    rows = [row for row in read_csv(path) if (row["step"], row["measure"], row["recipe"]) != probe]
    _write(path, rows + csv_rows(scores))


def drop_later_probes(path: Path, step: int) -> None:
    """Drop the rows of later steps. A resumed run calls it with its checkpoint's step, and measures them again."""
    if rows := read_csv(path):
        _write(path, [row for row in rows if int(row["step"]) <= step])


def _write(path: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
