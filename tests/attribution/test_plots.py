"""Pictures of attribution.csv: the numbers that go into them, and that each is written."""

import csv

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import spearmanr

from agrepa_fast.attribution.csv import COLUMNS
from agrepa_fast.attribution.selection import LayerSelection
from agrepa_fast.reporting.attribution_plot import draw_attribution
from agrepa_fast.reporting.layer_time_plot import draw_layer_time
from agrepa_fast.reporting.plots import plot_all
from agrepa_fast.reporting.score_table import (
    compare_probes,
    layer_names,
    scores_by_layer,
    steps_of,
    tabulate,
    times_of,
    top_k,
)
from agrepa_fast.reporting.stability_plot import draw_stability
from agrepa_fast.reporting.store_contribute_plot import draw_store_contribute

NAN = float("nan")


def cell(measure, step, domain, t, scores, stderr="", recipe="corrected"):
    """Rows of one table cell. scores: {layer: score}, or a list for layers 1, 2, ... with None where no row is."""
    scores = dict(enumerate(scores, 1)) if isinstance(scores, list) else scores
    constant = (str(step), measure, recipe, domain)
    return [
        dict(zip(COLUMNS, (*constant, str(layer), t, f"{score:.6g}", stderr, "0", "16"), strict=True))
        for layer, score in scores.items()
        if score is not None
    ]


def test_layers_are_in_the_order_of_the_network():
    # 12 layers: as texts, "10" comes before "2"
    assert layer_names(cell("foga", 1, "speech", "mean", [0.1] * 12), ("foga",)) == [str(n) for n in range(1, 13)]
    # the names are those of the measure, the depth is that of all rows: the last layer may be a gap
    rows = cell("foga", 1, "speech", "mean", {1: 1, 3: 1}) + cell("lasp", 1, "speech", "mean", {"10.ffn": 1, "2.a": 1})
    assert layer_names(rows, ("foga",)) == [str(n) for n in range(1, 11)]
    assert layer_names(rows, ("lasp",))[:4] == ["1.a", "1.ffn", "2.a", "2.ffn"]


def test_scores_are_in_layer_order_with_gaps():
    rows = cell("foga", 1, "speech", "mean", {11: 0.5, 3: 0.25, 2: NAN, 1: 0.125})
    scores = scores_by_layer(tabulate(rows)["foga", 1, "speech", "mean"], layer_names(rows, ("foga",)))
    np.testing.assert_array_equal(scores, [0.125, NAN, 0.25, *[NAN] * 7, 0.5])
    rows = cell("foga", 1, "speech", "mean", [1.0], stderr="inf") + cell("cka", 1, "speech", "mean", [1.0])
    for key in tabulate(rows).values():  # of a single clip; not given
        assert np.isnan(scores_by_layer(key, ["1"], "stderr"))


def test_steps_and_times_are_ordered_as_numbers():
    rows = cell("foga", 1000, "speech", "mean", [1]) + cell("foga", 200, "speech", "mean", [1])
    rows += cell("foga", 300, "audio", "mean", [1]) + cell("lasp", 5000, "speech", "mean", [1])
    rows += cell("foga", 400, "speech", "mean", [NAN])  # nothing measured: not a step that has scores
    assert steps_of(tabulate(rows), "foga") == [200, 300, 1000]
    assert steps_of(tabulate(rows), "foga", "speech") == [200, 1000]
    rows = [row for t in ("0.95", "mean", "nan", "0.5", "1e-05") for row in cell("foga", 7, "audio", t, [1])]
    assert times_of(tabulate(rows), "foga", 7) == ["1e-05", "0.5", "0.95"]
    assert times_of(tabulate(rows), "foga", 8) == []


def test_two_scores_of_a_layer_are_refused_and_recipes_are_not_mixed():
    rows = cell("foga", 1, "speech", "mean", [1, 2])
    with pytest.raises(ValueError, match=r"two scores of layer 2 .*'foga', 1, 'speech', 'mean'"):
        tabulate(rows + cell("foga", 1, "speech", "mean", {2: 3}))
    rows += cell("foga", 1, "speech", "mean", {1: 5}, recipe="official")
    rows += cell("foga", 2, "speech", "mean", [5], recipe="official")
    rows += cell("lasp", 2, "speech", "mean", [7, 8], recipe="official")
    for table in (tabulate(rows), tabulate(rows[::-1])):
        assert table.keys() == {("foga", 1, "speech", "mean"), ("lasp", 2, "speech", "mean")}
        assert scores_by_layer(table["foga", 1, "speech", "mean"], ["1", "2"]).tolist() == [1, 2]


def test_top_k_and_changes_between_probes_by_hand():
    assert top_k(np.array([0.2, NAN, 0.9, 0.5]), 2) == [2, 3]
    assert top_k(np.array([0.2, NAN, 0.9, 0.5]), 9) == [2, 3, 0]
    series = np.array([[4, 3, 2, 1, NAN], [3, 4, 2, 1, NAN], [1, 2, 3, 4, NAN], [1, 2, 3, NAN, 9.0]])
    rho, kept = compare_probes(series, 2)
    assert kept == [2, 0, 1]  # {1,2} -> {2,1} -> {4,3} -> {5,3}
    assert rho == pytest.approx([0.8, -0.8, 1.0])


def test_the_heat_map_shows_the_last_scores_of_foga():
    rows = [row for t in ("mean", "0.5") for row in cell("foga", 5, "audio", t, [0.25, None, 0.75])]
    rows += [row for t in ("mean", "0.5") for row in cell("foga", 4, "audio", t, [9, 9, 9])]
    rows += [row for t in ("mean", "0.5") for row in cell("foga-vjp", 6, "audio", t, [0.5])]  # an estimate of FoG-A
    image = draw_layer_time(rows).axes[0].images[0].get_array().filled(NAN)
    np.testing.assert_array_equal(image, [[0.25], [NAN], [0.75]])


def test_stability_shows_the_measure_that_chose_the_layers():
    """gradnorm at three steps, and FoG-A at the end of the run."""
    rows = [row for step in (3, 1, 2) for row in cell("gradnorm", step, "speech", "mean", [step, None, 5])]
    axes = draw_stability(rows + cell("foga", 9, "speech", "mean", [1, 2, 3]), 1).axes[0]
    np.testing.assert_array_equal([line.get_ydata() for line in axes.lines[:3]], [[1, 2, 3], [NAN] * 3, [5, 5, 5]])


def test_correlations_are_of_the_last_step_that_has_both():
    contributes, stores = [0.9, None, 0.5, 0.6, 0.1], [0.5, 0.9, 0.3, 0.1, 0.2]
    rows = cell("foga", 1, "speech", "mean", [3, 2, 1]) + cell("lasp", 1, "speech", "mean", [3, 2, 1])
    rows += cell("foga", 2, "speech", "mean", contributes) + cell("cka", 2, "speech", "mean", stores)
    rows += cell("foga", 3, "speech", "mean", [1, 2, 3]) + cell("ridge", 3, "audio", "mean", [1, 2, 3])
    figure, rho = draw_store_contribute(rows)
    expected = spearmanr([0.9, 0.5, 0.6, 0.1], [0.5, 0.3, 0.1, 0.2]).statistic
    assert rho == {"speech": {"cka": pytest.approx(expected)}}
    np.testing.assert_allclose([bar.get_height() for bar in figure.axes[0].patches], [0.9, NAN, 0.5, 0.6, 0.1])
    for scores in ([0.0, 0.0], {"1.attn": 1, "2.attn": 2}):  # zero initialisation; parts against whole blocks
        rows = cell("foga", 0, "audio", "mean", scores) + cell("cka", 0, "audio", "mean", [0.1, 0.2])
        assert np.isnan(draw_store_contribute(rows)[1]["audio"]["cka"])


FOGA = cell("foga", 1, "speech", "mean", [1, 2])


@pytest.mark.parametrize(
    ("draw", "rows", "message"),
    [
        (draw_layer_time, FOGA, "no FoG-A at a time among the 2 rows"),
        (lambda rows: draw_stability(rows, 1), cell("cka", 3, "audio", "mean", [1]), "no contribution scores"),
        (draw_store_contribute, FOGA, "no storage scores .* among the 2 rows"),
        (draw_store_contribute, FOGA + cell("lasp", 2, "speech", "mean", [1]), "no contribution scores .* at a step"),
    ],
)
def test_a_picture_without_scores_is_refused(draw, rows, message):
    with pytest.raises(ValueError, match=message):
        draw(rows)


PROBES = [row for step in (1, 9) for t in ("mean", "0.5") for row in cell("foga", step, "speech", t, [0.1, 0.2])]
CKA = cell("cka", 9, "speech", "mean", [0.5, 0.5])
EVIDENCE = {"measure": "foga", "layers": ["L1", "L2.ffn"], "mean": [0.1, None], "stderr": [None, None], "floor": 0.0}
EVIDENCE |= {"clips": 3, "recipe": "corrected", "step": 1}


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (PROBES + CKA, {"attribution", "stability", "layer_time", "store_contribute"}),
        (CKA, {"attribution"}),
        (PROBES[:4] + CKA, {"attribution", "stability", "layer_time"}),  # never both at one step
    ],
)
def test_the_measures_of_a_run_decide_which_pictures_are_written(rows, names, tmp_path):
    table = tmp_path / "attribution.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert plot_all(table, {}, None, tmp_path, 1) == {}
    assert not list(tmp_path.glob("*.png"))
    rho = plot_all(table, {"speech": EVIDENCE}, None, tmp_path, 1)
    assert rho == ({"speech": {"cka": None}} if "store_contribute" in names else {})  # equal scores: no order
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    for path in tmp_path.glob("*.png"):
        assert np.ptp(imread(path), axis=(0, 1)).any()  # more than one colour


@pytest.mark.parametrize(
    ("choice", "probability", "line"),
    [
        ("hard", 0.49, "Top-1 cannot be told from the next: probability 0.49 < probe.confidence_floor 0.5"),
        ("hard", 0.5, "Top-1 with probability 0.50"),
        ("soft", 0.3, "soft choice: λ by the probability to be in the Top-1, which is this one with 0.30"),
        ("hard", None, None),
    ],
)
def test_the_picture_of_a_choice_says_how_sure_it_is(choice, probability, line):
    evidence = EVIDENCE | {"k": 1, "choice": choice, "top_k_probability": probability, "confidence_floor": 0.5}
    selection = LayerSelection("foga", {"speech": (1,)}, {"speech": (1.0,)}, evidence={"speech": evidence})
    title = draw_attribution(selection.evidence, selection).axes[0].title
    assert title.get_text().partition("filled = aligned")[2].strip() == (line or "")
    assert (title.get_color() == "firebrick") == (selection.warning is not None) == (probability == 0.49)
