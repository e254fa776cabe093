"""Pictures of attribution.csv, checked through what is drawn: heights, lines, images, ticks and texts."""

import csv

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from scipy.stats import spearmanr

from agrepa_fast.attribution.csv import COLOURS, COLUMNS
from agrepa_fast.reporting import plots
from agrepa_fast.reporting.plots import (
    _layer_time,
    _stability,
    _store_contribute,
    changes,
    in_order,
    layer_names,
    plot_layer_time,
    plot_stability,
    plot_store_contribute,
    steps_of,
    tabulate,
    times_of,
    top_k,
)

NAN = float("nan")


def cell(measure, step, domain, t, scores, stderr="", recipe="corrected", clips="16"):
    """Rows of one table cell. scores: {layer: score}, or a list for layers 1, 2, ... with None where no row is."""
    scores = dict(enumerate(scores, 1)) if isinstance(scores, list) else scores
    constant = (str(step), measure, recipe, domain)
    return [
        dict(zip(COLUMNS, (*constant, str(layer), t, f"{score:.6g}", stderr, "0.000e+00", clips), strict=True))
        for layer, score in scores.items()
        if score is not None
    ]


def values_of(axes):
    """The y data of every line of the axes."""
    return [np.asarray(line.get_ydata(), float) for line in axes.lines]


def ticks_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def image_of(axes):
    return np.ma.filled(axes.images[0].get_array().astype(float), NAN)


# Selection, by hand


def test_layers_are_in_the_order_of_the_network():
    # 12 layers: as texts, "10" comes before "2"
    assert layer_names(cell("foga", 1, "speech", "mean", [0.1] * 12), ("foga",)) == [str(n) for n in range(1, 13)]
    parts = {"2.ffn": 1, "10.attn": 1, "1.attn": 1, "2.attn": 1}
    names = layer_names(cell("foga", 1, "speech", "mean", parts), ("foga",))
    assert names[:4] == ["1.attn", "1.ffn", "2.attn", "2.ffn"]
    assert len(names) == 20
    # the names are those of the measure, the depth is that of all rows: the last layer may be a gap
    rows = cell("foga", 1, "speech", "mean", {1: 1, 3: 1}) + cell("lasp", 1, "speech", "mean", {"4.ffn": 1})
    assert layer_names(rows, ("foga",)) == ["1", "2", "3", "4"]
    assert layer_names(rows, ("lasp",)) == ["1.ffn", "2.ffn", "3.ffn", "4.ffn"]


def test_scores_are_in_layer_order_with_gaps():
    rows = cell("foga", 1, "speech", "mean", {11: 0.5, 3: 0.25, 2: NAN, 1: 0.125}, stderr="")
    table = tabulate(rows)
    scores = in_order(table["foga", 1, "speech", "mean"], layer_names(rows, ("foga",)))
    np.testing.assert_array_equal(scores, [0.125, NAN, 0.25, *[NAN] * 7, 0.5])
    one = tabulate(cell("foga", 1, "speech", "mean", [1.0], stderr="inf") + cell("cka", 1, "speech", "mean", [1.0]))
    assert np.isnan(in_order(one["foga", 1, "speech", "mean"], ["1"], "stderr"))  # of a single clip
    assert np.isnan(in_order(one["cka", 1, "speech", "mean"], ["1"], "stderr"))  # not given


def test_selects_measure_step_domain_and_time():
    rows = []
    for number, (measure, step, domain, t) in enumerate(
        (m, s, d, t)
        for m in ("foga", "lasp")
        for s in (900, 1000)
        for d in ("speech", "audio")
        for t in ("mean", "0.3")
    ):
        rows += cell(measure, step, domain, t, [number, number + 0.5])
    table = tabulate(rows)
    assert in_order(table["foga", 900, "speech", "mean"], ["1", "2"]).tolist() == [0, 0.5]
    assert in_order(table["foga", 900, "audio", "0.3"], ["1", "2"]).tolist() == [3, 3.5]
    assert in_order(table["foga", 1000, "speech", "mean"], ["1", "2"]).tolist() == [4, 4.5]
    assert in_order(table["lasp", 900, "speech", "0.3"], ["1", "2"]).tolist() == [9, 9.5]


def test_steps_and_times_are_ordered_as_numbers():
    rows = cell("foga", 1000, "speech", "mean", [1]) + cell("foga", 200, "speech", "mean", [1])
    rows += cell("foga", 300, "audio", "mean", [1]) + cell("lasp", 5000, "speech", "mean", [1])
    rows += cell("foga", 400, "speech", "mean", [NAN])  # nothing measured: not a step that has scores
    assert steps_of(tabulate(rows), "foga") == [200, 300, 1000]
    assert steps_of(tabulate(rows), "foga", "speech") == [200, 1000]
    rows = [row for t in ("0.95", "mean", "nan", "0.5", "1e-05") for row in cell("foga", 7, "audio", t, [1])]
    assert times_of(tabulate(rows), "foga", 7) == ["1e-05", "0.5", "0.95"]
    assert times_of(tabulate(rows), "foga", 8) == []


def test_two_scores_of_a_layer_are_refused():
    rows = cell("foga", 1, "speech", "mean", [1, 2]) + cell("foga", 1, "speech", "mean", {2: 3})
    with pytest.raises(ValueError, match=r"two scores of layer 2 .*'foga', 1, 'speech', 'mean'"):
        tabulate(rows)


def test_recipes_of_a_measure_are_not_mixed():
    rows = cell("foga", 1, "speech", "mean", [1, 2]) + cell("foga", 1, "speech", "mean", {1: 5}, recipe="official")
    rows += cell("foga", 2, "speech", "mean", [5], recipe="official")
    rows += cell("lasp", 2, "speech", "mean", [7, 8], recipe="official")
    for given in (rows, rows[::-1]):
        table = tabulate(given)
        assert (
            list(table) == [("foga", 1, "speech", "mean"), ("lasp", 2, "speech", "mean")][:: 1 if given is rows else -1]
        )
        assert in_order(table["foga", 1, "speech", "mean"], ["1", "2"]).tolist() == [1, 2]
        assert in_order(table["lasp", 2, "speech", "mean"], ["1", "2"]).tolist() == [7, 8]


def test_top_k_leaves_gaps_out():
    assert top_k(np.array([0.2, NAN, 0.9, 0.5]), 2) == [2, 3]
    assert top_k(np.array([0.2, NAN, 0.9, 0.5]), 9) == [2, 3, 0]


def test_changes_between_probes_by_hand():
    series = np.array([[4, 3, 2, 1, NAN], [3, 4, 2, 1, NAN], [1, 2, 3, 4, NAN], [1, 2, 3, NAN, 9.0]])
    rho, kept = changes(series, 2)
    assert kept == [2, 0, 1]  # {1,2} -> {2,1} -> {4,3} -> {5,3}
    assert rho == pytest.approx([0.8, -0.8, 1.0])


# Layer x time


def layer_time_rows(domains=("speech", "audio")):
    """10 layers, layer 4 never measured; step 900 is upside down, so that the wrong step shows."""
    rows = []
    for place, domain in enumerate(domains):
        for column, t in enumerate(("0.1", "0.5", "0.9")):
            scores = [None if layer == 3 else 10 * layer + column + 100 * place for layer in range(10)]
            scores[column] = 500 + column + 100 * place  # the highest layer is L1 at 0.1, L2 at 0.5, L3 at 0.9
            rows += cell("foga", 1000, domain, t, scores)
            rows += cell("foga", 900, domain, t, [10.0 - layer for layer in range(10)])
        for step in (900, 1000):
            rows += cell("foga", step, domain, "mean", [1.0] * 3)
        rows += cell("lasp", 2000, domain, "0.1", [1.0] * 12) + cell("lasp", 2000, domain, "mean", [1.0])
    return rows


def test_heat_map_shows_each_domains_last_scores():
    figure = _layer_time(layer_time_rows())
    assert len(figure.axes) == 3  # two panels and the colour bar
    for place, (domain, axes) in enumerate(zip(("speech", "audio"), figure.axes, strict=False)):
        expected = np.array([[10.0 * layer + column + 100 * place for column in range(3)] for layer in range(12)])
        expected[3], expected[10:] = NAN, NAN
        for column in range(3):
            expected[column, column] = 500 + column + 100 * place
        np.testing.assert_array_equal(image_of(axes), expected)
        assert axes.images[0].get_clim() == pytest.approx((0, 602))  # one scale, speech's highest is 502
        assert ticks_of(axes.xaxis) == ["0.1", "0.5", "0.9"]
        assert ticks_of(axes.yaxis) == [f"L{layer}" for layer in range(1, 13)]
        assert axes.yaxis_inverted()  # the first layer is on top
        assert axes.collections[0].get_offsets().tolist() == [[0, 0], [1, 1], [2, 2]]  # stars: (time, layer)
        assert axes.get_title() == f"{domain}: FoG-A\nat step 1000, 16 clips"
    assert "relative velocity change" in figure.axes[2].get_ylabel()
    assert "grey = not measured" in figure.axes[2].get_ylabel()


def test_heat_map_of_one_domain_without_gaps():
    rows = [row for t in ("0.2", "0.8") for row in cell("foga-vjp", 5, "audio", t, [0.25, 0.5], recipe="official")]
    figure = _layer_time(rows + cell("foga-vjp", 5, "audio", "mean", [0.25, 0.5], recipe="official"))
    assert [axes.get_title() for axes in figure.axes] == [
        "audio: FoG-A by vjp (official recipe)\nat step 5, 16 clips",
        "",
    ]
    assert image_of(figure.axes[0]).tolist() == [[0.25, 0.25], [0.5, 0.5]]
    assert "grey" not in figure.axes[1].get_ylabel()


def test_a_model_at_its_zero_initialisation():
    rows = [row for d in COLOURS for t in ("mean", "0.5") for row in cell("foga", 0, d, t, [0.0, 0.0])]
    figure = _layer_time(rows)
    figure.draw_without_rendering()
    shown = [axes.images[0].to_rgba(image_of(axes)).tolist() for axes in figure.axes[:2]]
    assert shown[0] == shown[1]  # the same colour for the same score
    assert np.isnan(_store_contribute(rows + cell("cka", 0, "audio", "mean", [0.1, 0.2]))[1]["audio"]["cka"])


def test_foga_is_preferred_to_its_estimate():
    rows = [row for t in ("mean", "0.5") for row in cell("foga", 5, "audio", t, [0.25])]
    rows += [row for t in ("mean", "0.5") for row in cell("foga-vjp", 6, "audio", t, [0.5])]
    assert image_of(_layer_time(rows).axes[0]).tolist() == [[0.25]]
    assert _stability(rows, 1).axes[0].get_title().startswith("audio: FoG-A over training")


def test_no_heat_map_without_times():
    given = [row for t in ("mean", "nan") for row in cell("foga", 5, "audio", t, [0.25, 0.5])]
    with pytest.raises(ValueError, match="no FoG-A at a time among the 4 rows"):
        _layer_time(given)
    with pytest.raises(ValueError, match="no FoG-A at a time"):
        _layer_time([row for t in ("mean", "0.5") for row in cell("gradnorm", 5, "audio", t, [0.25])])


# Stability


def stability_rows(domains=("speech", "audio"), steps=(200, 400, 1000)):
    """5 layers, L2 never measured; the order turns round between the first and the second probe."""
    series = {200: [5, None, 4, 3, 2], 400: [1, None, 2, 3, 4], 1000: [1, None, 2, 4, 3]}
    return [
        row
        for place, domain in enumerate(domains)
        for step in reversed(steps)
        for row in cell(
            "foga", step, domain, "mean", [score and score + 10 * place for score in series[step]], clips="1"
        )
    ]


def test_lines_over_training():
    figure = _stability(stability_rows(), k=2)
    columns = np.array(figure.axes).reshape(3, 2).T
    for place, (domain, (lines, order, stayed)) in enumerate(zip(COLOURS, columns, strict=True)):
        drawn = values_of(lines)
        every, bold = drawn[:5], drawn[5:]
        add = 10 * place
        expected = np.array([[5, 1, 1], [NAN] * 3, [4, 2, 2], [3, 3, 4], [2, 4, 3]]) + add
        np.testing.assert_array_equal(every, expected)
        np.testing.assert_array_equal(bold, expected[[3, 4]])  # L4, then L5
        assert [line.get_color() for line in lines.lines[5:]] == [COLOURS[domain]] * 2
        assert len({line.get_linestyle() for line in lines.lines[5:]}) == 2
        assert all(list(line.get_xdata()) == [200, 400, 1000] for line in lines.lines)
        assert [(text.get_text(), text.xy) for text in lines.texts] == [
            ("L4", (1000, 4 + add)),
            ("L5", (1000, 3 + add)),
        ]
        assert (
            lines.get_title() == f"{domain}: FoG-A over training\nbold = Top-2 of the last probe, at step 1000, 1 clip"
        )
        assert lines.get_ylim()[0] == 0
        assert list(order.lines[0].get_xdata()) == list(stayed.lines[0].get_xdata()) == [400, 1000]
        assert values_of(order)[0] == pytest.approx([-1.0, spearmanr([1, 2, 3, 4], [1, 2, 4, 3]).statistic])
        assert order.get_ylim()[0] < -1  # the correlation is inside the picture
        assert values_of(stayed)[0].tolist() == [0, 2]  # {1, 3} -> {5, 4} -> {4, 5}
        assert texts_of(order) == texts_of(stayed) == []
    assert columns[0][2].get_ylabel() == "stayed in\nthe Top-2"


def test_labels_of_close_lines_stand_apart():
    rows = cell("foga", 1, "audio", "mean", [0.5, 0.9, 0.9001, 0.9002]) + cell(
        "foga", 2, "audio", "mean", [0.5, 1, 1, 1]
    )
    texts = _stability(rows, k=3).axes[0].texts
    assert [text.get_text() for text in texts] == ["L2", "L3", "L4"]
    heights = [text.get_position()[1] for text in texts]
    assert np.diff(heights) == pytest.approx([-0.05, -0.05])


def test_one_probe_says_that_there_is_nothing_to_compare():
    figure = _stability(stability_rows(("audio",), (400,)), k=3)
    lines, order, stayed = figure.axes
    assert texts_of(order) == texts_of(stayed) == ["one probe: nothing to compare"]
    np.testing.assert_array_equal(np.ravel(values_of(lines)[:5]), [11 - 10, NAN, 2, 3, 4])
    assert texts_of(lines) == ["L5", "L4", "L3"]
    assert all(line.get_marker() == "." for line in lines.lines)  # a line through one point would be invisible
    assert [axes.get_xticks().tolist() for axes in figure.axes] == [[400]] * 3
    assert "at step 400" in lines.get_title()


def test_domains_may_be_probed_at_different_steps():
    rows = stability_rows(("speech",)) + stability_rows(("audio",), (200, 400))
    speech, audio = _stability(rows, k=1).axes[:2]
    assert [list(axes.lines[0].get_xdata()) for axes in (speech, audio)] == [[200, 400, 1000], [200, 400]]
    assert [axes.get_title().split(", ")[1] for axes in (speech, audio)] == ["at step 1000", "at step 400"]


def test_stability_takes_what_contribution_there_is():
    rows = cell("gradnorm", 1, "audio", "mean", [1, 2]) + cell("gradnorm", 2, "audio", "mean", [2, 1])
    axes = _stability(rows + cell("lasp", 3, "audio", "mean", [1, 2]), k=1).axes
    assert axes[0].get_ylabel() == "gradient norm"
    assert axes[0].get_title().startswith("audio: gradient norm")
    assert _stability(cell("lasp", 3, "audio", "mean", [1, 2]), k=1).axes[0].get_title().startswith("audio: LASP")
    with pytest.raises(ValueError, match=r"no contribution scores \(foga, foga-vjp, gradnorm\) among the 2 rows"):
        _stability(cell("cka", 3, "audio", "mean", [1, 2]), k=1)


# What is stored against what contributes

CONTRIBUTES = {"speech": [0.9, None, 0.5, 0.6, 0.1], "audio": [0.2, None, 0.8, 0.4, 0.6]}
LASP = {"speech": [0.1, 0.9, 0.3, 0.2, 0.4], "audio": [-0.1, 0.2, 0.3, 0.4, 0.5]}
CKA = {"speech": [0.5, 0.4, 0.3, 0.2, 0.1], "audio": [0.3, 0.1, 0.2, 0.5, 0.4]}


def store_rows(domains=("speech", "audio")):
    """Layer 2 does not contribute anything that was measured. Step 900 has both, upside down; 2000 lacks storage."""
    rows = []
    for domain in domains:
        rows += cell("foga", 1000, domain, "mean", CONTRIBUTES[domain], stderr="0.05")
        rows += cell("foga", 1000, domain, "0.5", [7.0] * 5)
        rows += cell("lasp", 1000, domain, "mean", LASP[domain], recipe="official", clips="1")
        rows += cell("cka", 1000, domain, "mean", CKA[domain], clips="64")
        for measure, step in (("foga", 900), ("ridge", 900), ("foga", 2000)):
            rows += cell(measure, step, domain, "mean", [5, 4, 3, 2, 1])
    return rows


@pytest.mark.parametrize("domains", [("speech", "audio"), ("audio",)], ids="+".join)
def test_bars_contribute_and_lines_store(domains):
    figure, _ = _store_contribute(store_rows(domains))
    grid, twins = np.array(figure.axes[: 2 * len(domains)]).reshape(-1, 2), figure.axes[2 * len(domains) :]
    assert len(grid) == len(twins) == len(domains)
    for domain, (left, right), other in zip(domains, grid, twins, strict=True):
        contributes = np.array([score or NAN for score in CONTRIBUTES[domain]])
        np.testing.assert_allclose([bar.get_height() for bar in left.patches], contributes)
        assert {bar.get_facecolor()[:3] for bar in left.patches} == {to_rgb(COLOURS[domain])}
        errors = [np.ptp(segment[:, 1]) / 2 for segment in left.collections[0].get_segments() if len(segment)]
        assert errors == pytest.approx([0.05] * 4)
        stored = {line.get_label(): line.get_ydata().tolist() for line in other.lines}
        assert stored == {"LASP (official recipe), 1 clip": LASP[domain], "CKA, 64 clips": CKA[domain]}
        assert len({(line.get_color(), line.get_marker()) for line in other.lines}) == 2
        assert ticks_of(left.xaxis) == ["L1", "L2", "L3", "L4", "L5"]
        title = f"{domain}: FoG-A as bars ± standard error, storage as lines\nat step 1000, 16 clips"
        assert left.get_title() == title
        zero = [(0 - low) / (high - low) for low, high in (left.get_ylim(), other.get_ylim())]
        assert zero[0] == pytest.approx(zero[1])  # also where a score is negative
        assert other.get_ylim()[0] <= min(LASP[domain])
        assert (left.get_ylabel(), right.get_ylabel()) == (
            "contributes: relative velocity change",
            "rank by contribution (1 = most)",
        )


def test_ranks_and_correlations():
    figure, rho = _store_contribute(store_rows())
    # ranks among the layers that have both: L1, L3, L4, L5; 1 is the highest score
    contribution = {"speech": [1, NAN, 3, 2, 4], "audio": [4, NAN, 1, 3, 2]}
    storage = {
        "speech": {"lasp": [4, NAN, 2, 3, 1], "cka": [1, NAN, 2, 3, 4]},
        "audio": {"lasp": [4, NAN, 3, 2, 1], "cka": [3, NAN, 4, 1, 2]},
    }
    both = [0, 2, 3, 4]
    for domain, axes in zip(("speech", "audio"), figure.axes[1:4:2], strict=True):
        drawn = {line.get_label().split()[0].lower(): line for line in axes.lines if line.get_marker() != "None"}
        assert list(drawn) == ["lasp", "cka"]
        for measure, line in drawn.items():
            np.testing.assert_array_equal(line.get_xdata(), storage[domain][measure])
            np.testing.assert_array_equal(line.get_ydata(), contribution[domain])
            scores = {"lasp": LASP, "cka": CKA}[measure][domain]
            expected = spearmanr([CONTRIBUTES[domain][i] for i in both], [scores[i] for i in both]).statistic
            assert rho[domain][measure] == pytest.approx(expected)
            assert line.get_label().endswith(f" = {expected:.2f}")
        labels = {text.get_text(): text.xy for text in axes.texts}
        right = np.min(list(storage[domain].values()), axis=0)  # the rightmost marker
        assert labels == {f"L{i + 1}": (right[i], contribution[domain][i]) for i in both}
        assert axes.xaxis_inverted()
        assert axes.yaxis_inverted()  # 1 is on top and on the right
        assert axes.get_title() == f"{domain}: FoG-A against storage\nat step 1000, 16 clips"
    assert rho["speech"]["lasp"] == pytest.approx(-1.0)
    assert rho["audio"]["cka"] == pytest.approx(-0.4)


def test_last_step_that_has_both_in_a_domain():
    rows = cell("foga", 1, "speech", "mean", [3, 2, 1]) + cell("lasp", 1, "speech", "mean", [3, 2, 1])
    rows += cell("foga", 2, "speech", "mean", [1, 2, 3]) + cell("lasp", 2, "audio", "mean", [3, 2, 1])
    figure, rho = _store_contribute(rows)
    assert rho == {"speech": {"lasp": pytest.approx(1.0)}}
    assert "at step 1," in figure.axes[0].get_title()


@pytest.mark.parametrize("stderr", ["", "inf"])
def test_no_error_bars_where_there_is_no_standard_error(stderr):
    rows = cell("foga", 1, "speech", "mean", [3, 2], stderr=stderr) + cell("lasp", 1, "speech", "mean", [3, 2])
    axes = _store_contribute(rows)[0].axes[0]
    assert not any(map(len, axes.collections[0].get_segments()))
    assert axes.get_title().startswith("speech: FoG-A as bars, storage as lines")


def test_layers_that_share_a_rank_share_a_label():
    rows = cell("foga", 1, "speech", "mean", [3, 2, 2, 0, 0, 0, 0]) + cell("lasp", 1, "speech", "mean", list(range(7)))
    figure, _ = _store_contribute(rows)
    assert texts_of(figure.axes[1]) == ["L1", "L2, L3", "L4, L5, L6 … (4 tied)"]


def test_parts_against_whole_blocks_have_no_correlation():
    rows = cell("foga", 1, "audio", "mean", {"1.attn": 1, "1.ffn": 2, "2.attn": 3, "2.ffn": 4})
    figure, rho = _store_contribute(rows + cell("lasp", 1, "audio", "mean", [1, 2]))
    assert np.isnan(rho["audio"]["lasp"])
    assert ticks_of(figure.axes[0].xaxis) == ["L1", "L1.attn", "L1.ffn", "L2", "L2.attn", "L2.ffn"]


def test_missing_storage_or_contribution():
    with pytest.raises(ValueError, match=r"no storage scores \(lasp, ridge, cka\) among the 2 rows"):
        _store_contribute(cell("foga", 1, "speech", "mean", [1, 2]))
    rows = cell("foga", 1, "speech", "mean", [1, 2]) + cell("lasp", 2, "speech", "mean", [1, 2])
    with pytest.raises(ValueError, match=r"no contribution scores .* at a step and domain with storage"):
        _store_contribute(rows)


# All of them


def test_pictures_are_written_from_a_csv(tmp_path):
    file = tmp_path / "attribution.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(store_rows())
    with file.open(newline="") as source:
        rows = list(csv.DictReader(source))
    plot_layer_time(rows, tmp_path / "time.png")
    plot_stability(rows, tmp_path / "stability.png", k=3)
    assert plot_store_contribute(rows, tmp_path / "scd.png") == _store_contribute(rows)[1]
    for name in ("time", "stability", "scd"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def boxes_of(texts):
    """Where the words of these texts stand, without their leader lines."""
    return {text.get_text(): Text.get_window_extent(text) for text in texts if text.get_text() and text.get_visible()}


def ticks_in_view(axis):
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()
    ]


BLOCKS = [str(block) for block in range(1, 25)]
PARTS = [f"{block}.{part}" for block in BLOCKS for part in ("attn", "ffn")]


@pytest.mark.parametrize("layers", [BLOCKS[:8], BLOCKS, PARTS], ids=len)
def test_nothing_is_cropped_and_no_labels_overlap(layers):
    rows, random = [], np.random.default_rng(0)
    for measure in ("foga", "lasp", "ridge", "cka"):
        for t in ("mean", "0.1", "0.3", "0.5", "0.7", "0.9"):
            scores = dict(zip(layers, random.random(len(layers)), strict=True))
            rows += cell(measure, 100000, "speech", t, scores, stderr="0.01", recipe="official")
    for figure in (_layer_time(rows), _stability(rows, 6), _store_contribute(rows)[0]):
        figure.draw_without_rendering()
        titles, inside = {}, figure.bbox.padded(1)
        for axes in figure.axes:
            titles |= boxes_of([axes.title])
            groups = [
                axes.texts,
                ticks_in_view(axes.xaxis),
                ticks_in_view(axes.yaxis),
                [axes.xaxis.label, axes.yaxis.label],
            ]
            for boxes in (*map(boxes_of, groups), titles):
                for name, box in boxes.items():
                    assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, name
                    assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, name
                    clash = [other for other in boxes if other != name and box.padded(-0.5).overlaps(boxes[other])]
                    assert not clash, (name, clash)


def test_what_a_run_measured_decides_what_is_drawn(tmp_path):
    """Everything; only what layers store; storage at a step that FoG-A never saw; nothing."""
    foga, late = (
        [row_of(measure="foga", step=step, layer=str(k), t=t) for k in (1, 2) for t in ("mean", "0.5")]
        for step in (1, 9)
    )
    cka = [row_of(measure="cka", step=9, layer=str(k), t="mean") for k in (1, 2)]
    evidence = {"speech": {"measure": "foga", "mean": [0.1, None], "stderr": [None, None], "floor": 0.0, "clips": 3}}
    evidence["speech"]["layers"] = ["L1", "L2"]
    evidence["speech"] |= {"recipe": "corrected", "step": 1}
    drawn = {
        "all": ({"attribution", "stability", "layer_time", "store_contribute"}, late + cka),
        "apart": ({"attribution", "stability", "layer_time", "store_contribute"}, foga + late + cka),
        "stored": ({"attribution"}, cka),
        "contributed": ({"attribution", "stability", "layer_time"}, foga),
        "never both": ({"attribution", "stability", "layer_time"}, foga + cka),
    }
    for name, (wanted, rows) in drawn.items():
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "attribution.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        found = plots.plot_all(folder / "attribution.csv", evidence, None, folder, 1)
        assert {path.stem for path in folder.glob("*.png")} == wanted, name
        assert found == ({"speech": {"cka": None}} if "store_contribute" in wanted else {})  # equal scores: no order
    assert plots.plot_all(folder / "attribution.csv", {}, None, tmp_path, 1) == {}
    assert not list(tmp_path.glob("*.png"))


def row_of(**given) -> dict:
    values = {"recipe": "corrected", "domain": "speech", "score": "0.5", "stderr": "", "floor": "0", "clips": "3"}
    return values | {name: str(value) for name, value in given.items()}


def test_stability_is_that_of_what_chose_the_layers():
    """gradnorm at three steps, and FoG-A at the end of the run."""
    rows = [row_of(measure="gradnorm", step=step, layer=str(k), t="mean") for step in (1, 2, 3) for k in (1, 2)]
    rows += [row_of(measure="foga", step=9, layer=str(k), t="mean") for k in (1, 2)]
    assert _stability(rows, 1).axes[0].get_title().startswith("speech: gradient norm")
    assert _stability(rows[4:], 1).axes[0].get_title().startswith("speech: FoG-A")


def test_parts_of_blocks_keep_their_names(tmp_path, monkeypatch):
    names = ["L1.attn", "L1.ffn", "L2.attn"]
    evidence = {"measure": "foga", "layers": names, "mean": [0.1, 0.2, 0.3], "stderr": [None] * 3, "floor": 0.0}
    figures, new_figure = [], plots._new_figure
    monkeypatch.setattr(plots, "_new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    evidence |= {"clips": 1, "recipe": "corrected", "step": None}
    plots.plot_attribution({"audio": evidence}, None, tmp_path / "a.png")
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] == names
