"""Plots: a histogram against a density, and line plots.

Figures are made without pyplot, which would choose the backend of the whole process and keep every
figure.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.viz._files import load

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# More lines than colours: the next round is dashed, then dotted.
LINE_STYLES = ("-", "--", ":")


class Lines(NamedTuple):
    """A line plot, to be a block of a report.

    Attributes:
      series: `{name: (x, y)}`, each a sequence of numbers. Gaps where they are not finite.
      x_label: what the horizontal axis shows.
      y_label: what the vertical axis shows.
      log_x: whether the horizontal axis is logarithmic; ignored if no x is positive.
      log_y: whether the vertical axis is logarithmic; ignored if no y is positive.
      caption: one line under it.
    """

    series: Mapping[str, tuple[Any, Any]]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    caption: str = ""


def histogram_frame(
    samples: Any,
    x: Any,
    density: Any,
    *,
    reference: Any = None,
    title: str = "",
    y_max: float | None = None,
    bins: int = 80,
    size: tuple[int, int] = (640, 400),
    labels: tuple[str, str, str] = ("samples", "exact density", "reference"),
) -> np.ndarray:
    """Draws a histogram of numbers against a density, as one frame of an animation.

    The bars cover the range of `x` and are normalised by all samples, those outside it too, so
    they estimate the density itself. Give every frame the same `x` and `y_max`, and the axes
    stand still.

    Args:
      samples: the numbers, of any shape.
      x: where the density is known, ascending, `(K,)`.
      density: its values there, `(K,)`.
      reference: another density, `(K,)`, drawn dashed and thin: where the samples should end.
      title: one line above the plot.
      y_max: upper end of the vertical axis; by default what the density needs.
      bins: number of bars.
      size: width and height in pixels.
      labels: what the legend calls the samples, the density and the reference.

    Returns:
      uint8 `(height, width, 3)`.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: there are no samples, or x and density are not curves of one length.
    """
    samples, x, density = (np.asarray(a, np.float64) for a in (samples, x, density))
    if x.ndim != 1 or x.shape != density.shape or x.size < 2 or not (np.diff(x) > 0).all():
        raise ValueError(
            "x must be ascending and density as long, both (K,) with K > 1; "
            f"got shapes {x.shape} and {density.shape}"
        )
    if not samples.size:
        raise ValueError("samples must not be empty")
    counts, edges = np.histogram(samples.ravel(), bins=bins, range=(x[0], x[-1]))
    heights = counts / (samples.size * np.diff(edges))
    figure, axes = _figure_and_axes((size[0] / 100, size[1] / 100))
    axes.stairs(heights, edges, fill=True, color=COLOURS[0], alpha=0.45, label=labels[0])
    axes.plot(x, density, color=COLOURS[1], linewidth=2, label=labels[1])
    if reference is not None:
        axes.plot(x, reference, color="0.25", linestyle="--", linewidth=1.1, label=labels[2])
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, y_max if y_max is not None else 1.15 * max(density.max(), 1e-12))
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set_xlabel("x")
    axes.set_ylabel("density")
    axes.legend(loc="upper right", frameon=False)
    canvas = load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def lines_svg(plot: Lines) -> bytes:
    """Draws a line plot as an SVG file; the same plot is the same bytes.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: x and y of a series differ in length.
    """
    figure, axes = _figure_and_axes((7.2, 3.6))
    curves = [_curve(name, *points) for name, points in plot.series.items()]
    handles = []
    for i, (x, y) in enumerate(curves):
        # A single point needs a dot.
        handles += axes.plot(
            x,
            y,
            color=COLOURS[i % len(COLOURS)],
            linestyle=LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)],
            marker="o" if x.size == 1 else None,
            linewidth=1.6,
        )
    # A logarithmic axis without anything to show would be an error.
    if plot.log_x and any((x > 0).any() for x, _ in curves):
        axes.set_xscale("log")
    if plot.log_y and any((y > 0).any() for _, y in curves):
        axes.set_yscale("log")
    axes.set_xlabel(plot.x_label, parse_math=False)
    axes.set_ylabel(plot.y_label, parse_math=False)
    if handles:
        # Handed over, because matplotlib leaves out names of its own that begin with "_".
        legend = axes.legend(handles, list(map(str, plot.series)), frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return svg_bytes(figure)


def svg_bytes(figure: Any) -> bytes:
    """Returns a figure as an SVG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with load("matplotlib").rc_context({"svg.hashsalt": "jaxdiff"}):  # else ids are random
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def bare(axes: Any) -> None:
    """Leaves of a frame what helps to read: two sides and a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _curve(name: str, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points of a series, with gaps where they are not finite."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if x.shape != y.shape:
        raise ValueError(
            f"series {name!r} must have x and y of one length, got {x.size} and {y.size}"
        )
    return np.where(np.isfinite(x), x, np.nan), np.where(np.isfinite(y), y, np.nan)


def _figure_and_axes(size: tuple[float, float]) -> tuple[Any, Any]:
    """Makes a figure of `size` in units of 100 pixels."""
    figure = load("matplotlib.figure").Figure(figsize=size, dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.set_facecolor("white")
    axes = figure.add_subplot()
    bare(axes)
    return figure, axes
