"""The files of an evaluation, damaged or written by others: refused in one line, and compared over shared clips."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.aggregate import SetDistances
from agrepa_fast.evaluation.compare import differences
from agrepa_fast.evaluation.results import FIELDS, write_embeddings
from agrepa_fast.evaluation.stored import read_clips, read_embeddings, read_layers, read_losses, read_results
from agrepa_fast.reporting import comparison
from agrepa_fast.reporting.report import write_report

from .test_compare import CLIPS, evaluated

DAMAGED = (b"", b"{", b"[]", b"null", b"{}", b"7", b'"x"', b'{"a": "\xff"}', b"\0" * 64, b"[" * 100_000, b"9" * 6000)


def compared_run(folder: Path, label: str) -> Path:
    """A run that was evaluated, as `agrepa compare` and `agrepa report` read it."""
    evaluated(folder / "evaluate", label, 0)
    (folder / "config.yaml").write_text(f"align: {{strategy: {label}}}\n")
    losses = {"val/flow_loss": {"ema": 0.5}, "val/flow_loss_by_domain": {"speech": 0.5}}
    (folder / "summary.json").write_text(json.dumps({"steps": 5, **losses}))
    (folder / "selection.json").write_text(json.dumps({"layers": {"speech": [1]}}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "val/flow_loss": 0.5}\n')
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for label in ("none", "foga"):
        compared_run(folder / label, label)
    return folder


@pytest.mark.parametrize(
    "name",
    ["evaluate/results.json", "evaluate/clips.csv", "evaluate/embeddings.npz", "summary.json", "selection.json"],
)
def test_no_content_of_a_file_is_a_traceback(name, runs, tmp_path, capsys, monkeypatch):
    for plot in ("plot_forest", "plot_curves"):
        monkeypatch.setattr(comparison, plot, lambda *_: None)
    monkeypatch.chdir(shutil.copytree(runs, tmp_path / "runs"))
    refused = 0
    for content in DAMAGED:
        Path("foga", name).write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            main(["compare", "none", "foga", "--out", "out"])
        *_, line = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert line.startswith("agrepa compare: foga/")
        assert len(line) < 1100
        assert not Path("out", "compare.csv").exists(), "half of a result"
        refused += Path(name).name in line
    assert refused == len(DAMAGED)


@pytest.mark.parametrize(
    "content", [*DAMAGED, b'{"step": 1e999}', b'{"step": 1, "val/flow_loss": ' + b"9" * 400 + b"}"]
)
def test_learning_curves_leave_out_damaged_lines(content, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "plot_forest", lambda *_: None)
    monkeypatch.chdir(shutil.copytree(runs, tmp_path / "runs"))
    Path("foga", "metrics.jsonl").write_bytes(content)
    main(["compare", "none", "foga", "--out", "out"])
    assert Path("out", "plots", "curves.png").stat().st_size
    assert Path("out", "report.html").is_file()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("manifest",), 7, "manifest: Input should be a valid string"),
        (("confidence",), float("nan"), "confidence: Input should be"),
        (("confidence",), 2, "confidence: Input should be less than 1"),
        (("rows", "sample"), None, "rows.sample: Input should be a valid dictionary"),
        (("rows", "sample", "speech", "mos"), {}, "rows.sample.speech.mos.value: Field required"),
        (("rows", "sample", "speech", "mos", "value"), float("inf"), "should be a finite number"),
        (("models",), {"mos": {}}, "models.mos.spec: Field required"),
    ],
)
def test_a_wrong_entry_of_results_is_named(path, value, said, runs, tmp_path):
    content = json.loads((runs / "foga" / "evaluate" / "results.json").read_text())
    part = content
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results.json is damaged .*: run agrepa evaluate again") as refused:
        read_results(tmp_path / "results.json")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[2].pop(), "row 3: other columns"),
        (lambda rows: rows[0].append("more"), "row 1: other columns"),
        (lambda rows: rows[1].__setitem__(FIELDS.index("mos"), "nan"), "row 2: mos is nan"),
        (lambda rows: rows[1].__setitem__(FIELDS.index("words"), "1.5"), "row 2: invalid literal for int"),
        (lambda rows: rows[1].__setitem__(FIELDS.index("draw"), ""), "row 2: invalid literal for int"),
        (lambda rows: rows[3].__setitem__(FIELDS.index("text"), "x" * 200_000), "row 4: field larger than"),
    ],
)
def test_a_wrong_row_of_clips_is_named(change, said, runs, tmp_path):
    header, *rows = csv.reader(io.StringIO((runs / "foga" / "evaluate" / "clips.csv").read_text()))
    change(rows)
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    (tmp_path / "clips.csv").write_text(text.getvalue())
    with pytest.raises(UserError, match=r"clips.csv is damaged") as refused:
        read_clips(tmp_path / "clips.csv")
    assert said in str(refused.value)


def test_the_losses_of_domains_are_told_if_there_are_several(runs, tmp_path):
    run, results = shutil.copytree(runs / "none", tmp_path / "run"), {"averaged": True, "step": 5}
    assert read_losses(run, results) == {"": 0.5}
    summary = json.loads((run / "summary.json").read_text())
    summary["val/flow_loss_by_domain"] = {"speech": 0.25, "audio": 0.75}
    (run / "summary.json").write_text(json.dumps(summary))
    assert read_losses(run, results) == {"": 0.5, "speech": 0.25, "audio": 0.75}
    assert read_losses(run, {**results, "averaged": False}) == read_losses(run, {**results, "step": 3}) == {}


def test_a_run_without_its_own_files_is_none(tmp_path):
    assert read_losses(tmp_path, {}) == {}
    assert read_layers(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("speech/sample", np.zeros((2, 3, 4, 5))),
        ("speech/reference", np.zeros((2, 3, 4))),
        ("speech/sample", np.array([[1.0, np.nan], [0, 0]])),
        ("speech/sample", np.array([["a", "b"]])),
        ("speech/sample", np.array(1.0)),
        ("speech/sample", np.array([None, {}], object)),
    ],
    ids=str,
)
def test_embeddings_are_finite_arrays(name, array, tmp_path):
    np.savez(tmp_path / "embeddings.npz", **{name: array})
    with pytest.raises(UserError, match=r"embeddings.npz is damaged"):
        read_embeddings(tmp_path / "embeddings.npz")


def test_distances_are_compared_over_the_clips_that_both_runs_could_embed(tmp_path):
    """A model that refuses one wav of one run must not shift the pairs."""
    runs = [evaluated(tmp_path / label, label, 0, worse=worse) for label, worse in (("none", 0.0), ("foga", 0.4))]
    arrays = {run.label: read_embeddings(run.folder / "embeddings.npz") for run in runs}
    for run, missing in zip(runs, (3, 20), strict=True):
        kept = [place for place in range(len(CLIPS)) if place != missing]
        stored = arrays[run.label] | {"speech/sample": arrays[run.label]["speech/sample"][kept]}
        np.savez(run.folder / "embeddings.npz", **stored, **{"speech/sample/keys": np.array(CLIPS)[kept]})
    (mmd,) = (one for one in differences(runs, "none", 0.95) if one.metric == "mmd")
    shared = [place for place in range(len(CLIPS)) if place not in (3, 20)]
    distances = SetDistances(arrays["none"]["speech/reference"])
    one, other = (distances.value("mmd", arrays[label]["speech/sample"][shared]) for label in ("foga", "none"))
    assert mmd.clips.value == pytest.approx(one - other)
    assert mmd.clips.n == 22


def test_embeddings_without_keys_are_those_of_all_clips_or_refused(tmp_path):
    """Written before keys were."""
    runs = [evaluated(tmp_path / label, label, 0) for label in ("none", "foga")]
    assert {one.metric for one in differences(runs, "none", 0.95)} >= {"mmd"}
    arrays = read_embeddings(runs[1].folder / "embeddings.npz")
    np.savez(runs[1].folder / "embeddings.npz", **arrays | {"speech/sample": arrays["speech/sample"][1:]})
    runs[1].__dict__.pop("_arrays")
    with pytest.raises(UserError, match=r"speech/sample in embeddings.npz does not belong to"):
        differences(runs, "none", 0.95)


def test_draws_of_a_clip_are_compared_apart_and_means_of_them_are_refused(tmp_path):
    """Versions before wrote the means: they vary less than any model's samples."""
    runs = [evaluated(tmp_path / label, label, 0, worse=worse) for label, worse in (("none", 0.0), ("foga", 0.4))]
    arrays = {run.label: read_embeddings(run.folder / "embeddings.npz") for run in runs}
    both = {label: part["speech/sample"][:, None] + [[[0.0] * 3, [1.0] * 3]] for label, part in arrays.items()}
    for run in runs:
        run.clips.extend({**row, "draw": 1} for row in list(run.clips))
        np.savez(run.folder / "embeddings.npz", **arrays[run.label] | {"speech/sample": both[run.label]})
    (mmd,) = (one for one in differences(runs, "none", 0.95) if one.metric == "mmd")
    distances = SetDistances(arrays["none"]["speech/reference"])
    one, other = (np.mean([distances.value("mmd", both[label][:, draw]) for draw in (0, 1)]) for label in both)
    assert mmd.clips.value == pytest.approx(other - one)
    assert mmd.clips.n == 24
    np.savez(runs[1].folder / "embeddings.npz", **arrays["foga"] | {"speech/sample": both["foga"].mean(axis=1)})
    runs[1].__dict__.pop("_arrays")
    with pytest.raises(UserError, match=r"foga: embeddings\.npz has means over 2 draws"):
        differences(runs, "none", 0.95)


def test_keys_stand_beside_their_embeddings(tmp_path):
    write_embeddings({"speech": {}}, {}, ["sample"], tmp_path / "embeddings.npz")
    arrays = read_embeddings(tmp_path / "embeddings.npz")
    assert {name: len(array) for name, array in arrays.items()} == {"speech/sample": 0, "speech/sample/keys": 0}


def test_a_loss_that_diverged_has_no_p_value(tmp_path):
    runs = [evaluated(tmp_path / f"{label}{seed}", label, seed) for label in ("none", "foga") for seed in (0, 1)]
    runs[3].losses[""] = float("nan")
    (loss,) = (one for one in differences(runs, "none", 0.95) if one.metric == "val/flow_loss")
    assert loss.p is None
    assert not loss.clear


@pytest.mark.parametrize("name", ["results.json", "clips.csv"])
def test_a_report_of_a_damaged_evaluation_is_one_line(name, runs, tmp_path):
    folder = shutil.copytree(runs / "foga" / "evaluate", tmp_path / "evaluate")
    for content in DAMAGED:
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            write_report(folder)
