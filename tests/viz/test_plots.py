import os
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff import viz
from jaxdiff.viz import plots

pytest.importorskip("matplotlib")


def test_histogram_bars_are_a_density():
    # Uniform on [0, 1], half of the range shown: the bars reach 1, and the curve lies at 1 too.
    samples = (np.arange(10_000) + 0.5) / 10_000
    x = np.linspace(0, 0.5, 11)
    frame = viz.histogram_frame(
        samples, x, np.ones(11), y_max=2.0, bins=10, size=(300, 200), title="$ and_$"
    )
    assert frame.shape == (200, 300, 3)
    assert frame.dtype == np.uint8
    # The curve's rows (orange) against the extent of the bars (blue): the bars end at the curve.
    red, green, blue = (frame[..., i].astype(int) for i in range(3))
    column = slice(70, 120)  # left of the legend
    curve = np.flatnonzero(((red > 180) & (blue < 90))[:, column].any(1))
    bars = np.flatnonzero(((blue > red + 60) & (green > red))[:, column].any(1))
    assert abs(bars.min() - curve.mean()) < 4
    # And halfway up the axis.
    assert abs((bars.max() - curve.mean()) / (bars.max() - bars.min()) - 1) < 0.1


def test_histogram_axes_stand_still():
    x = np.linspace(-4, 4, 50)
    normal = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    rng = np.random.default_rng(0)
    frames = [
        viz.histogram_frame(s * rng.normal(size=200), x, normal / s, y_max=0.9, size=(240, 160))
        for s in (0.5, 2)
    ]
    # The lower strip holds the horizontal axis' numbers, the left one those of the vertical axis.
    np.testing.assert_array_equal(frames[0][-35:], frames[1][-35:])
    np.testing.assert_array_equal(frames[0][:, :35], frames[1][:, :35])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], [0, 1], [1, 1]), "empty"),
        (([0.5], [0, 1], [1]), "as long"),
        (([0.5], [1, 0], [1, 1]), "ascending"),
    ],
)
def test_histogram_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        viz.histogram_frame(*arguments)


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"empty": ([], [])},
        {"one": ([1], [2.0])},
        {"nan": ([1, 2], [np.nan, np.inf])},
        {"negative": ([-1, 0], [-1, 0])},
        {"$x_1": ([1, 2], [1, 2]), "$": ([1, 2], [2, 1])},
        {f"series {i}": ([0, 1], [i, i]) for i in range(15)},
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_plots_survive_what_training_may_log(series, log):
    plot = viz.Lines(series, "x", "y", log_x=log, log_y=log)
    assert plots.lines_svg(plot).rstrip().endswith(b"</svg>")


def test_same_plot_is_same_bytes():
    plot = viz.Lines({"a": ([1, 2], [3, 4])}, "x", "y")
    assert plots.lines_svg(plot) == plots.lines_svg(plot)


def test_import_is_light_and_plotting_leaves_the_backend_alone():
    code = """
import sys
from jaxdiff import viz
assert not {"PIL", "matplotlib"} & set(sys.modules), "heavy import"
viz.histogram_frame([0.5], [0, 1], [1, 1])
viz.plots.lines_svg(viz.Lines({"a": ([1, 2], [1, 2])}))
import matplotlib
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.get_backend(auto_select=False) is None
"""
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("module", "package", "draw"),
    [
        ("PIL", "Pillow", lambda: viz.save_png("a.png", np.zeros((2, 2), np.uint8))),
        ("matplotlib", "matplotlib", lambda: viz.histogram_frame([0.5], [0, 1], [1, 1])),
    ],
)
def test_missing_package_names_the_extra(monkeypatch, module, package, draw):
    for name in list(sys.modules):
        if name.partition(".")[0] == module:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "jaxdiff\[plots\]"'):
        draw()
