"""The files of an evaluation: clips.csv with raw counts, results.json with intervals, manifest.json."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json, replace_file, write_atomically
from .aggregate import CLIP_METRICS, SET_METRICS, SetDistances, clip_interval
from .intervals import Interval
from .manifest import Clip, manifest_hash
from .scores import Figures
from .synthesis import Wav

COUNTS = ("words", "errors", "sub", "del", "ins", "chars", "char_errors", "heard_words", "heard_errors")
SCORES = ("logprob", "mos", "dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl", "similarity", "similarity_prompt", "mel_l1")
FIELDS = ("row", "domain", "key", "draw", "seconds", *COUNTS, "understood", *SCORES, "text", "heard", "sha256")


def clip_rows(
    wavs: Sequence[Wav], figures: Sequence[Figures], seconds: Callable[[Wav], float], sha256: Mapping[Wav, str]
) -> list[dict]:
    """Return the rows of clips.csv. What does not apply to a wav is None, never 0. sha256: of the wavs whose files are
    there; the others have no seconds."""
    rows = []
    for wav in wavs:
        row = dict.fromkeys(FIELDS)
        row |= {"row": wav.row, "domain": wav.clip.domain, "key": wav.clip.key, "draw": wav.clip.draw}
        if wav in sha256:
            row |= {"seconds": round(seconds(wav), 3), "sha256": sha256[wav]}
        for part in figures:
            row |= {name: value for name, value in part.get(wav, {}).items() if name in FIELDS}
        rows.append(row)
    return rows


def write_clips(rows: Sequence[dict], file: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    write_atomically(file, text.getvalue())


def summarise(
    rows: Sequence[dict],
    embeddings: Mapping[str, Figures],
    references: Mapping[str, np.ndarray],
    only: Sequence[str],
    confidence: float,
) -> dict[str, dict[str, dict[str, dict]]]:
    """Return row -> domain -> metric -> value, low, high, n, unit and method. embeddings, references: by domain."""
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for name in dict.fromkeys(row["row"] for row in rows):
        for domain in dict.fromkeys(row["domain"] for row in rows if row["row"] == name):
            part = [row for row in rows if (row["row"], row["domain"]) == (name, domain)]
            values = found.setdefault(name, {}).setdefault(domain, {})
            for metric, about in CLIP_METRICS.items():
                if (interval := clip_interval(metric, part, confidence)) is not None:
                    values[metric] = _entry(interval, about.unit)
            vectors = embedding_matrix(embeddings.get(domain, {}), name)
            if len(vectors) > 1 and len(references.get(domain, ())) > 1:
                distances = SetDistances(references[domain])
                for metric, unit in SET_METRICS.items():
                    if ("mmd" if metric == "mmd" else "fad") in only:
                        values[metric] = _entry(distances.interval(metric, vectors, confidence), unit)
    return found


def write_embeddings(
    embeddings: Mapping[str, Figures], references: Mapping[str, np.ndarray], rows: Sequence[str], file: Path
) -> None:
    """Write the arrays that distances are of: "<domain>/<row>" and "<domain>/reference"; and the clips that the rows of
    an array are of, "<domain>/<row>/keys"."""
    arrays = {}
    for domain, part in embeddings.items():
        for row in rows:
            arrays[f"{domain}/{row}"] = embedding_matrix(part, row)
            arrays[f"{domain}/{row}/keys"] = np.array(list(_embedded(part, row)), str)
    arrays |= {f"{domain}/reference": reference for domain, reference in references.items()}
    with replace_file(file) as stream:
        np.savez(stream, **arrays)


def embedding_matrix(figures: Figures, row: str) -> np.ndarray:
    """Return the embeddings of a row, by key: (clips, dim), or (clips, draws, dim) if clips have several draws."""
    vectors = np.array(list(_embedded(figures, row).values()))
    return vectors[:, 0] if vectors.ndim == 3 and vectors.shape[1] == 1 else vectors


def _embedded(figures: Figures, row: str) -> dict[str, list]:
    """Return key -> vectors of its draws, by key, of the clips of a row that have one of every draw."""
    of_clip: dict[str, dict[int, list]] = {}
    draws = sorted({wav.clip.draw for wav in figures if wav.row == row})
    for wav, figure in figures.items():
        if wav.row == row and "vector" in figure:
            of_clip.setdefault(wav.clip.key, {})[wav.clip.draw] = figure["vector"]
    return {
        key: [vectors[draw] for draw in draws] for key, vectors in sorted(of_clip.items()) if len(vectors) == len(draws)
    }


def _entry(interval: Interval, unit: str) -> dict[str, Any]:
    ends = {
        name: value if isfinite(value) else None for name, value in (("low", interval.low), ("high", interval.high))
    }
    return {"value": interval.value, **ends, "n": interval.n, "unit": unit, "method": interval.method}


def write_manifest(clips: Sequence[Clip], made: Mapping[str, object], file: Path) -> str:
    """Write the clips and what the wavs are made with, unless they are there, and return the clips' hash. Raises
    UserError if the folder holds another evaluation."""
    content = {"manifest": manifest_hash(clips), "made": dict(made), "clips": [asdict(clip) for clip in clips]}
    if file.is_file():
        there = read_json(file, "choose another --out")
        there = there if isinstance(there, dict) else {}
        for name in ("manifest", "made"):
            if there.get(name) != json.loads(json.dumps(content[name])):
                raise UserError(
                    f"{file.parent} holds an evaluation of other {'clips' if name == 'manifest' else 'samples'} "
                    f"({_differing(there.get(name), content[name])}): choose another --out"
                )
    else:
        write_atomically(file, json.dumps(content, indent=1) + "\n")
    return content["manifest"]


def _differing(old: object, new: object) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return next((f"{name} {old.get(name)} and {new[name]}" for name in new if old.get(name) != new[name]), "")
    return f"{old} and {new}"
