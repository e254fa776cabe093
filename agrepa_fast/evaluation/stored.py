"""The files of an evaluation, read back and checked: a disk, an editor or another version may have changed them."""

import csv
import io
import zipfile
import zlib
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ..data.samples import parse_npy
from ..errors import UserError, one_line
from ..files import read_json, read_text
from ..settings import Fraction
from .results import COUNTS, FIELDS, SCORES

_REMEDY = "run agrepa evaluate again with another --out"
_OTHER_RUN = "train the run again, or leave it out"
_TYPES = dict.fromkeys((*COUNTS, "draw"), int) | dict.fromkeys((*SCORES, "seconds"), float)
_NAMES = {"row", "domain", "key", "draw"}  # columns that no clips.csv lacks


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True)


class _Entry(_Checked):
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    n: int


class _Rows(_Checked):
    sample: dict[str, dict[str, _Entry]]
    truth: dict[str, dict[str, _Entry]] = {}
    codes: dict[str, dict[str, _Entry]] = {}


class _Model(_Checked):
    spec: str


class _Results(_Checked):
    manifest: str
    vocoder: str
    flow: dict | None
    models: dict[str, _Model]
    circular: dict[str, str]
    confidence: Fraction
    rows: _Rows
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}


class _Losses(_Checked):
    ema: float  # nan, if the run diverged


class _Summary(_Checked):
    steps: int
    losses: _Losses = Field(alias="val/flow_loss")
    by_domain: dict[str, float] = Field(alias="val/flow_loss_by_domain")


class _Selection(_Checked):
    layers: dict[str, list[int]]


def read_results(file: Path) -> dict:
    """Return the content of a results.json. Raises UserError, which names the first entry that is wrong."""
    return _checked(file, _Results, _REMEDY)


def read_losses(run: Path, results: dict) -> dict[str, float]:
    """Return the validation flow loss of the weights that an evaluation of a run measured: of all clips, as "", and of
    each domain if there are several. {} if that is unknown: summary.json is missing, or of another step, or the weights
    are not the averaged ones. Raises UserError for a damaged one."""
    file = run / "summary.json"
    if not file.is_file():
        return {}
    summary = _checked(file, _Summary, _OTHER_RUN)
    if not results.get("averaged", True) or results.get("step", summary["steps"]) != summary["steps"]:
        return {}
    by_domain = summary["val/flow_loss_by_domain"]
    return {"": summary["val/flow_loss"]["ema"], **(by_domain if len(by_domain) > 1 else {})}


def read_layers(run: Path) -> dict[str, list[int]]:
    """Return domain -> the layers that a run aligns, {} if it has no selection.json. Raises UserError for one that is
    damaged."""
    file = run / "selection.json"
    return _checked(file, _Selection, _OTHER_RUN)["layers"] if file.is_file() else {}


def _checked(file: Path, kind: type[_Checked], remedy: str) -> Any:
    """Return the content of a JSON file of a kind."""
    content = read_json(file, remedy)
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{file} is damaged ({place}: {first['msg']}): {remedy}") from error
    return content


def read_clips(file: Path) -> list[dict]:
    """Return the rows of a clips.csv. Raises UserError, which names the first row that is wrong."""
    rows = []
    try:
        for row in csv.DictReader(io.StringIO(read_text(file), newline="")):
            if not row.keys() >= _NAMES or None in row or None in row.values():
                raise ValueError("other columns")
            rows.append({name: _parsed(name, row.get(name, "")) for name in FIELDS})
        if not rows:
            raise ValueError("the file ends before it")
    except (ValueError, csv.Error) as error:
        raise _damaged(file, f"row {len(rows) + 1}: {error}") from error
    return rows


def _parsed(name: str, text: str) -> object:
    if name in ("text", "heard"):
        return text
    if text == "" and name not in _NAMES:
        return None
    value = text == "True" if name == "understood" else _TYPES.get(name, str)(text)
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{name} is {text}")
    return value


def read_embeddings(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an embeddings.npz: "<domain>/<row>", (clips, dim) or (clips, draws, dim),
    "<domain>/reference", (clips, dim), and "<domain>/<row>/keys", (clips,). Raises UserError for other content."""
    try:
        with zipfile.ZipFile(file) as stored:
            arrays = {name.removesuffix(".npy"): parse_npy(stored.read(name)) for name in stored.namelist()}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(file, one_line(error)) from error
    for name, array in arrays.items():
        dims = {"keys": (1,), "reference": (2,)}.get(name.rpartition("/")[2], (2, 3))
        finite = array.dtype.kind == "f" and np.isfinite(array).all()
        if array.size and (array.ndim not in dims or not (finite or dims == (1,))):
            raise _damaged(file, f"{name} has the shape {array.shape}, or is not finite")
    return arrays


def _damaged(file: Path, fault: str) -> UserError:
    return UserError(f"{file} is damaged ({fault}): {_REMEDY}")
