"""Comparisons of named sets: what is computed against NumPy, what is drawn by its artists."""

import base64
import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdiff import viz
from jaxdiff.viz import comparisons

pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
DENSITIES = viz.Densities(
    {
        "real": {"a": RNG.normal(size=50), "b": RNG.lognormal(0, 2, 50)},
        "synthetic": {"a": [0.0, np.nan, 1.5], "c": [1, 2, 2]},
    },
    units={"a": "mg/dl"},
    caption="densities",
)
BARS = viz.Bars(
    {"real": {"sex": ["f", "f", "m", None], "stage": [1, 2, 4, 4]}, "synthetic": {"sex": ["m"]}},
    categories={"stage": [1, 2, 3, 4]},
    caption="bars",
)
HEATMAPS = viz.Heatmaps(
    {"real": np.eye(3), "synthetic": [[1, 0.5, np.nan], [0.5, 1, -1], [np.nan, -1, 1]]},
    ["x", "y", "z"],
    "maps",
)
TRAJECTORIES = viz.Trajectories(
    {
        "real": {"a": [([0, 1, 2], [3, np.nan, 5]), ([1], [2])], "b": [([0, 1], [1, 1000])]},
        "synthetic": {"a": [([4, 0], [7, 6])], "b": [([], [])]},
    },
    caption="lines",
)
BLOCKS = [DENSITIES, BARS, HEATMAPS, TRAJECTORIES]
by_kind = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)


@given(
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e12, 1e12)),
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(1e-12, 1e12)),
    st.integers(1, 60),
    st.sampled_from([None, True, False]),
)
def test_histograms_have_area_one_and_common_bins(first, second, bins, log):
    result = comparisons.histograms({"first": first, "second": second}, bins, log)
    assert (np.diff(result.edges) > 0).all()
    assert len(result.edges) <= bins + 2  # whole numbers may need one bin more
    widths = np.diff(np.log10(result.edges) if result.log else result.edges)
    for heights in result.heights.values():
        assert heights.shape == widths.shape
        np.testing.assert_allclose((heights * widths).sum(), 1, rtol=1e-9)


def test_histograms_estimate_the_density():
    # 4 bins of width 0.5 on [0, 2]: shares 1/2, 0, 1/4, 1/4 give heights twice that.
    result = comparisons.histograms({"x": [0, 0.25, 1.2, 2], "y": [0.6, np.nan, np.inf]}, bins=4)
    np.testing.assert_allclose(result.edges, [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(result.heights["x"], [1, 0, 0.5, 0.5])
    np.testing.assert_allclose(result.heights["y"], [0, 2, 0, 0])
    # Two decades in 4 bins: heights are per decade.
    result = comparisons.histograms({"x": [1, 2, 5, 100]}, bins=4, log=True)
    np.testing.assert_allclose(result.edges, 10.0 ** np.arange(0, 2.1, 0.5))
    np.testing.assert_allclose(result.heights["x"], [1, 0.5, 0, 0.5])


def test_whole_numbers_get_bins_around_them():
    result = comparisons.histograms({"x": [1, 2, 2, 5]}, bins=40)
    np.testing.assert_allclose(result.edges, np.arange(0.5, 6))
    np.testing.assert_allclose(result.heights["x"], [0.25, 0.5, 0, 0, 0.25])
    # More of them than bins: every bin still holds equally many.
    result = comparisons.histograms({"x": np.arange(100)}, bins=40)
    np.testing.assert_allclose(np.diff(result.edges), 3)


@pytest.mark.parametrize(
    ("values", "wanted", "log"),
    [
        ([1, 1, 1, 11.5], None, True),
        ([1, 1, 1, 9.5], None, False),
        ([1, 1, 1, 11.5], False, False),
        ([1, 1, 1, 9.5], True, True),
        ([0, 1, 1, 11.5], None, False),
        ([0, 1, 1, 11.5], True, False),  # no logarithm of zero, whoever asks for it
        ([np.nan], True, False),
    ],
)
def test_log_axis_for_skewed_positive_numbers(values, wanted, log):
    assert comparisons.histograms({"x": values}, log=wanted).log is log


def test_shares_are_of_all_rows_and_in_order():
    names, shares = comparisons.category_shares(
        {"real": ["10", "9", None, "9"], "synthetic": np.array([9, 9.0, np.nan, 0.5]), "none": []}
    )
    assert names == ["0.5", "9", "10", "(missing)"]
    assert list(shares) == ["real", "synthetic"]
    np.testing.assert_allclose(shares["real"], [0, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(shares["synthetic"], [0.25, 0.5, 0, 0.25])


def test_shares_keep_the_given_order_and_what_does_not_occur():
    names, shares = comparisons.category_shares({"x": ["b", "z", "b", "a"]}, ["low", "b", "a"])
    assert names == ["low", "b", "a", "z"]
    np.testing.assert_allclose(shares["x"], [0, 0.5, 0.25, 0.25])


def test_rare_categories_become_one():
    # "missing" is a word like others; what is missing has its own bar.
    values = ["missing"] * 4 + list("cab") * 2 + ["d", "e", None, float("nan")]
    names, shares = comparisons.category_shares({"x": values}, most=4)
    assert names == ["a", "b", "c", "missing", "(2 others)", "(missing)"]
    np.testing.assert_allclose(shares["x"], np.array([2, 2, 2, 4, 2, 2]) / 14)


def test_pandas_columns_and_their_missing_values():
    pandas = pytest.importorskip("pandas")
    real = pandas.DataFrame(
        {
            "kind": pandas.Series(["a", None, "b", "a"], dtype="string"),
            "flag": pandas.Series([True, False, None, True], dtype="boolean"),
        }
    )
    for column, names in {"kind": ["a", "b"], "flag": ["False", "True"]}.items():
        seen, shares = comparisons.category_shares({"real": real[column]})
        assert seen == [*names, "(missing)"]
        assert shares["real"][-1] == 0.25
    assert comparisons.comparison_svg(viz.Bars({"real": real}))


def test_bars_are_as_long_as_the_shares():
    sex, stage = comparisons._bars(BARS).axes
    # Three categories (f, m, missing) of each of two sets.
    real, synthetic = ([bar.get_width() for bar in bars] for bars in sex.containers)
    np.testing.assert_allclose(real, [50, 25, 25])
    np.testing.assert_allclose(synthetic, [0, 100, 0])
    assert [text.get_text() for text in sex.get_yticklabels()] == ["f", "m", "(missing)"]
    np.testing.assert_allclose([bar.get_width() for bar in stage.containers[0]], [25, 25, 0, 50])
    # Side by side: no bar lies over another, and the reference is above.
    spans = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in sex.patches)
    assert all(below[1] <= above[0] for below, above in itertools.pairwise(spans))
    assert sex.containers[0][0].get_y() < sex.containers[1][0].get_y()
    assert sex.yaxis_inverted()


def test_trajectories_share_axes_and_go_over_gaps():
    figure = comparisons._trajectories(TRAJECTORIES)
    real_a, real_b, synthetic_a, synthetic_b = figure.axes
    np.testing.assert_allclose(real_a.lines[0].get_xydata(), [[0, 3], [2, 5]])
    np.testing.assert_allclose(synthetic_a.lines[0].get_xydata(), [[0, 6], [4, 7]])  # by time
    assert not synthetic_b.lines
    assert "no data" in [text.get_text() for text in synthetic_b.texts]
    assert real_a.get_ylim() == synthetic_a.get_ylim() != real_b.get_ylim()
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    # 1 and 1000 with a median in between: logarithmic if asked, in all sets alike.
    log = comparisons._trajectories(TRAJECTORIES._replace(log={"b": True}))
    for axes in (log.axes[1], log.axes[3]):
        low, middle, high = (axes.transScale.transform((0, y))[1] for y in (1, 10, 100))
        np.testing.assert_allclose(high - middle, middle - low)


def test_trajectories_are_bounded_andwrapped():
    long = [(np.arange(1000), np.arange(1000.0))] * 5
    block = viz.Trajectories({"x": {f"v{i}": long for i in range(10)}, "y": {}}, most=2)
    figure = comparisons._trajectories(block)
    # Ten variables: three rows of four at most, twice.
    assert len(figure.axes) == 20
    assert figure.axes[0].get_gridspec().get_geometry() == (6, 4)
    assert len(figure.axes[0].lines) == 2
    x = figure.axes[0].lines[0].get_xdata()
    assert (len(x), x[0], x[-1]) == (200, 0, 999)


def test_heatmaps_have_one_scale():
    first, second, bar = comparisons._heatmaps(HEATMAPS).axes
    for axes in (first, second):
        assert axes.images[0].get_clim() == (-1, 1)
    grey = second.images[0].to_rgba(second.images[0].get_array())[0, 2, :3]
    np.testing.assert_allclose(grey, 0.6, atol=0.01)
    assert bar.get_ylim() == (-1, 1)
    assert [text.get_text() for text in first.get_yticklabels()] == ["x", "y", "z"]


@by_kind
def test_same_block_is_same_bytes(block):
    svg = comparisons.comparison_svg(block)
    assert svg == comparisons.comparison_svg(block)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    # A bound for mail: a page holds several of these.
    assert len(svg) < 100_000


@by_kind
def test_report_holds_the_drawing(block, tmp_path):
    block = block._replace(caption="<b>&")
    page = viz.report_html(tmp_path / "r.html", title="t", sections=[("s", [block])]).read_text()
    code = re.search(r'src="data:image/svg\+xml;base64,([^"]*)"', page).group(1)
    assert base64.b64decode(code) == comparisons.comparison_svg(block)
    assert "<figcaption>&lt;b&gt;&amp;</figcaption>" in page


def test_descriptions_name_what_is_shown(tmp_path):
    assert comparisons.describe(DENSITIES) == "Histograms of a, b, c; sets: real, synthetic"
    assert comparisons.describe(BARS) == "Bar charts of sex, stage; sets: real, synthetic"
    assert comparisons.describe(HEATMAPS) == "Heat maps of real, synthetic between x, y, z"
    assert comparisons.describe(TRAJECTORIES) == "Trajectories of a, b; sets: real, synthetic"
    block = viz.Bars({'"><script>': {"<i>": ["a"]}})
    page = viz.report_html(tmp_path / "r.html", title="t", sections=[("s", [block])]).read_text()
    assert "<script" not in page
    assert "<i>" not in page


# Mathematics to matplotlib, markup to a browser, no character at all to XML, and far too long.
NAMES = ["$a_1$", "$", "</text><script>&", "--", "_hidden", "line\nbreak \x00\ud800", "long " * 30]


@pytest.mark.parametrize("name", [*NAMES, "w" * 100], ids=ascii)
def test_any_name_can_be_drawn_whole(name):
    line = ([0, 1], [1, 2])
    blocks = [
        viz.Densities({name: {name: [1.5, 2]}}, {name: name}),
        viz.Bars({name: {name: [name, "b"]}}),
        viz.Heatmaps({name: np.eye(2)}, [name, "b"]),
        viz.Trajectories({name: {name: [line]}}, {name: name}, time_label=name),
    ]
    draw = (
        comparisons._densities,
        comparisons._bars,
        comparisons._heatmaps,
        comparisons._trajectories,
    )
    for block, function in zip(blocks, draw, strict=True):
        ElementTree.fromstring(comparisons.comparison_svg(block))
        figure = function(block)
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert (np.array([box.x0, box.y0]) > -0.02).all(), function
        assert (np.array([box.x1, box.y1]) < figure.get_size_inches() + 0.02).all(), function


@pytest.mark.parametrize(
    "block",
    [
        viz.Densities({}),
        viz.Densities({"x": {}}),
        viz.Densities({"x": {"a": []}, "y": {"a": [np.nan]}}),
        viz.Densities({"x": {"a": [3.0]}, "y": {"a": [1e17, 1e17]}}),
        viz.Bars({}),
        viz.Bars({"x": {"a": []}}, {"a": [1, 2]}),
        viz.Bars({"x": {"a": [None]}}),
        viz.Heatmaps({}, []),
        viz.Heatmaps({"x": np.zeros((0, 0))}, []),
        viz.Heatmaps({"x": np.full((1, 1), np.nan)}, ["a"]),
        viz.Trajectories({}),
        viz.Trajectories({"x": {}}),
        viz.Trajectories({"x": {"a": []}, "y": {"a": [([0], [np.nan])]}}, log={"a": True}),
    ],
)
def test_nothing_to_draw_is_no_error(block):
    ElementTree.fromstring(comparisons.comparison_svg(block))


def test_many_columns_and_sets():
    groups = {f"set {i}": {f"c{j}": [i, j, 0.5] for j in range(9)} for i in range(9)}
    figure = comparisons._densities(viz.Densities(groups))
    assert figure.axes[0].get_gridspec().get_geometry() == (3, 3)
    small = comparisons._densities(viz.Densities({"x": {"a": [1.0]}}))
    assert figure.get_figheight() > 2 * small.get_figheight()
    # Seven colours: the eighth set differs by its dashes.
    handles = figure.legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in handles}) == 9


def test_large_matrix_keeps_names_apart():
    figure = comparisons._heatmaps(
        viz.Heatmaps({"x": np.eye(200), "y": np.eye(200)}, [f"name {i}" for i in range(200)])
    )
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert 20 < len(boxes) < 200
    assert not any(box.overlaps(other) for box, other in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("block", "error", "match"),
    [
        (viz.Densities({"x": {"bili": ["high"]}}), ValueError, "'bili' of 'x' must be numbers"),
        (viz.Densities({"x": {"a": [1]}}, bins=0), ValueError, "bins must be 1 .. 500, got 0"),
        (viz.Densities({"x": [1, 2]}), TypeError, "set 'x' is list"),
        (viz.Bars({"x": "abc"}), TypeError, "set 'x' is str"),
        (viz.Heatmaps({"m": np.ones((2, 3))}, ["a", "b"]), ValueError, r"'m' must be square.*3\)"),
        (viz.Heatmaps({"m": np.eye(3)}, ["a", "b"]), ValueError, r"2 names.*\(3, 3\)"),
        (
            viz.Trajectories({"x": {"a": [([1], [1]), ([1, 2], [1])]}}),
            ValueError,
            "patient 1 in 'a' of 'x'.*one length, got 2 and 1",
        ),
        (viz.Trajectories({}, most=0), ValueError, "most must be at least 1"),
        (viz.Lines({}), TypeError, "got Lines"),
    ],
)
def test_errors(block, error, match):
    with pytest.raises(error, match=match):
        comparisons.comparison_svg(block)
