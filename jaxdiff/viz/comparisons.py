"""Comparisons of several sets, such as real and synthetic: small multiples for a report.

A panel for each column, the sets in one colour each in all of them. What is drawn:

1. densities: with n finite values of a set and k of them in a bin of width w, the height k/(n w),
   so that the area is one. The bins are those of all sets together. On a logarithmic axis w is
   the width in decades: areas stay what the eye sees.
2. bars: with n rows and k of a category, the share k/n. Missing values count as a category.
3. heat maps: matrices of numbers in [-1, 1] on one scale.
4. trajectories: values against time, one line a patient, the same axes for all sets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.viz._distributions import (
    MOST_CATEGORIES,
    category_shares,
    columns_of,
    curve_of,
    finite_of,
    histograms,
    is_log,
)
from jaxdiff.viz._files import load
from jaxdiff.viz._panels import (
    WIDTH,
    add_legend,
    count_lines,
    cut,
    listed,
    look_of,
    make_log,
    panel_grid,
    panels_across,
    say_no_data,
    text_width,
    title_of,
    wrapped,
)
from jaxdiff.viz.plots import svg_bytes


class Densities(NamedTuple):
    """Histograms of several sets over each other, one panel for each column.

    Attributes:
      groups: `{set: {column: numbers}}`; a set may lack columns, and tables that are indexed by
        column do as well. What is not finite is left out. The first set is filled: the reference.
      units: `{column: unit}`, to stand behind the name.
      log: `{column: whether the axis is logarithmic}`. By default it is where all values are
        positive and the largest is above ten times the median; never where one is not positive.
      bins: number of bins, at most 500; integers get bins of whole numbers.
      caption: one line under it.
    """

    groups: Mapping[str, Mapping[str, Any]]
    units: Mapping[str, str] | None = None
    log: Mapping[str, bool] | None = None
    bins: int = 40
    caption: str = ""


class Bars(NamedTuple):
    """Shares of categories in several sets side by side, one panel for each column.

    Attributes:
      groups: `{set: {column: values}}`, as in `Densities`; see `category_shares`.
      categories: `{column: its categories in their order}`; by default those that occur.
      caption: one line under it.
    """

    groups: Mapping[str, Mapping[str, Any]]
    categories: Mapping[str, Sequence[Any]] | None = None
    caption: str = ""


class Heatmaps(NamedTuple):
    """Square matrices side by side, with one colour scale from -1 to 1.

    Attributes:
      matrices: `{title: (N, N)}`. Grey where a number is NaN.
      names: of the rows and columns, `N`.
      caption: one line under it.
    """

    matrices: Mapping[str, Any]
    names: Sequence[str]
    caption: str = ""


class Trajectories(NamedTuple):
    """Some patients' values against time: a row of panels for each set, a column for each variable.

    Attributes:
      groups: `{set: {variable: [(times, values), ...]}}`, one pair a patient, in the same order
        for all variables: a patient has one colour in all of a set's panels. Visits without a
        finite value are left out; the line goes over them.
      units: `{variable: unit}`.
      log: as in `Densities`.
      time_label: what the horizontal axes show.
      most: how many patients of a set are drawn, the first ones. Of more than 200 visits of one
        patient, 200 are drawn.
      caption: one line under it.
    """

    groups: Mapping[str, Mapping[str, Sequence[tuple[Any, Any]]]]
    units: Mapping[str, str] | None = None
    log: Mapping[str, bool] | None = None
    time_label: str = "time"
    most: int = 8
    caption: str = ""


def comparison_svg(block: Densities | Bars | Heatmaps | Trajectories) -> bytes:
    """Draws a comparison as an SVG file; the same comparison is the same bytes.

    Raises:
      ImportError: matplotlib is missing.
      TypeError: a set is no mapping.
      ValueError: values are no numbers, times and values differ in length, a matrix is not square
        or has not the names' size, or a number is out of range.
    """
    match block:
        case Densities():
            return svg_bytes(_densities(block))
        case Bars():
            return svg_bytes(_bars(block))
        case Heatmaps():
            return svg_bytes(_heatmaps(block))
        case Trajectories():
            return svg_bytes(_trajectories(block))
    raise TypeError(
        "a comparison must be Densities, Bars, Heatmaps or Trajectories, "
        f"got {type(block).__name__}"
    )


def describe(block: Densities | Bars | Heatmaps | Trajectories) -> str:
    """Returns in words what a comparison shows, for those who cannot see it."""
    if isinstance(block, Heatmaps):
        return f"Heat maps of {listed(block.matrices)} between {listed(block.names)}"
    kind = {Densities: "Histograms", Bars: "Bar charts", Trajectories: "Trajectories"}[type(block)]
    return f"{kind} of {listed(columns_of(block.groups))}; sets: {listed(block.groups)}"


def _densities(block: Densities) -> Any:
    if not 1 <= block.bins <= 500:
        raise ValueError(f"bins must be 1 .. 500, got {block.bins}")
    columns = columns_of(block.groups)
    figure, panels = panel_grid([title_of(column, block.units) for column in columns], [1.2])
    for column, axes in zip(columns, panels, strict=True):
        result = histograms(
            {
                name: finite_of(group[column], f"{column!r} of {name!r}")
                for name, group in block.groups.items()
                if column in group
            },
            block.bins,
            (block.log or {}).get(column),
        )
        if not result.heights:
            say_no_data(axes)
            continue
        if result.log:
            make_log(axes, "x")
        else:
            axes.locator_params(axis="x", nbins=4)
        for i, name in enumerate(block.groups):
            if name not in result.heights:
                continue
            colour, style = look_of(i)
            heights = result.heights[name]
            if i == 0:
                axes.stairs(heights, result.edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(heights, result.edges, color=colour, linestyle=style, linewidth=1.3)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("per decade" if result.log else "density", fontsize=7, color="0.35")
        axes.locator_params(axis="y", nbins=3)
    lines = load("matplotlib.lines")
    handles = [
        lines.Line2D([], [], color=colour, linestyle=style, linewidth=1.8)
        for colour, style in map(look_of, range(len(block.groups)))
    ]
    add_legend(figure, handles, block.groups)
    return figure


def _bars(block: Bars) -> Any:
    columns = columns_of(block.groups)
    results = [
        category_shares(
            {name: group[column] for name, group in block.groups.items() if column in group},
            (block.categories or {}).get(column),
            MOST_CATEGORIES,
        )
        for column in columns
    ]
    labels = [[wrapped(name, 62, 7.5) for name in names] for names, _ in results]
    # Bars of one thickness in a row of panels: the one with the most categories needs the height.
    across = panels_across(len(columns))
    rows = [max(map(len, part)) for part in cut(labels, across)]
    lines = [count_lines(list(itertools.chain(*part))) for part in cut(labels, across)]
    heights = [
        max(0.7, row * max(0.09 * len(block.groups) + 0.08, 0.13 * line))
        for row, line in zip(rows, lines, strict=True)
    ]
    figure, panels = panel_grid([title_of(column, None) for column in columns], heights, left=74)
    for i, (axes, (_, shares), names) in enumerate(zip(panels, results, labels, strict=True)):
        if not names or not shares:
            say_no_data(axes)
            continue
        places, row = np.arange(len(names)), i // across
        thickness = min(0.8 / len(block.groups), 0.16 * rows[row] / heights[row])
        for j, name in enumerate(block.groups):
            if name in shares:
                offset = (j - (len(block.groups) - 1) / 2) * thickness
                axes.barh(
                    places + offset, 100 * shares[name], 0.92 * thickness, color=look_of(j)[0]
                )
        axes.set_yticks(places, names, parse_math=False)
        # The scale above, beside the first bars, however many rows the neighbours have.
        axes.set_ylim(rows[row] - 0.4, -0.6)
        axes.spines["left"].set_bounds(-0.6, len(names) - 0.4)
        axes.spines["bottom"].set_visible(False)
        axes.spines["top"].set_visible(True)
        axes.xaxis.tick_top()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter("{x:g} %")
    patches = load("matplotlib.patches")
    handles = [patches.Patch(color=look_of(j)[0]) for j in range(len(block.groups))]
    add_legend(figure, handles, block.groups)
    return figure


def _heatmaps(block: Heatmaps) -> Any:
    size = len(block.names)
    matrices = {}
    for name, matrix in block.matrices.items():
        matrix = np.asarray(matrix, np.float64)
        if matrix.shape != (size, size):
            raise ValueError(
                f"matrix {name!r} must be square with a row for each of the {size} names, "
                f"({size}, {size}); got {matrix.shape}"
            )
        matrices[name] = matrix
    if not size or not matrices:
        return panel_grid([], [1.2])[0]
    labels = [wrapped(name, 90, 7) for name in block.names]
    margin = max(map(text_width, "\n".join(labels).split("\n"))) * 7 / 72 + 0.2
    # Inches that a row needs for its name; below, fewer matrices stand side by side.
    need = 0.105 * count_lines(labels) + 0.01
    across = next(
        n
        for n in range(panels_across(len(matrices)), 0, -1)
        if n == 1 or (WIDTH - margin - 0.9) / n - 0.2 >= need * size
    )
    side = min(max(2.4, need * size), (WIDTH - margin - 0.9) / across - 0.2)
    every = math.ceil(need * size / side - 1e-9)
    titles = [wrapped(name, 72 * side, 9) for name in matrices]
    down = math.ceil(len(titles) / across)
    extra = sum(count_lines(part) for part in cut(titles, across)) * 0.16
    figure = load("matplotlib.figure").Figure(
        figsize=(across * (side + 0.2) + margin + 0.9, down * (side + margin + 0.15) + extra),
        dpi=100,
        layout="compressed",
        facecolor="white",
    )
    colours = load("matplotlib").colormaps["RdBu_r"].with_extremes(bad="0.6")
    panels, image = [], None
    for i, (title, matrix) in enumerate(zip(titles, matrices.values(), strict=True)):
        axes = figure.add_subplot(down, across, i + 1)
        image = axes.imshow(
            np.ma.masked_invalid(matrix), colours, vmin=-1, vmax=1, interpolation="nearest"
        )
        axes.set_title(title, fontsize=9, parse_math=False)
        places = np.arange(0, size, every)
        axes.set_xticks(places, labels[::every], rotation=90, fontsize=7, parse_math=False)
        # Names of rows at the left end only: they are the same for all.
        rows = labels[::every] if i % across == 0 else [""] * len(places)
        axes.set_yticks(places, rows, fontsize=7, parse_math=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        panels.append(axes)
    beyond = [np.abs(m[np.isfinite(m)]).max(initial=0) > 1 for m in matrices.values()]
    bar = figure.colorbar(
        image, ax=panels, extend="both" if any(beyond) else "neither", fraction=0.05, aspect=25
    )
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure


def _trajectories(block: Trajectories) -> Any:
    if block.most < 1:
        raise ValueError(f"most must be at least 1, got {block.most}")
    columns, sets = columns_of(block.groups), list(block.groups)
    curves = {
        (name, column): [
            curve_of(pair, f"patient {i} in {column!r} of {name!r}")
            for i, pair in enumerate(itertools.islice(group[column], block.most))
        ]
        for name, group in block.groups.items()
        for column in columns
        if column in group
    }
    across = panels_across(len(columns))
    # Where there are more variables than panels in a row: all sets, then the next variables.
    order = [
        (name, column)
        for part in cut(columns, across)
        for name in sets
        for column in (*part, *[None] * (across - len(part)))
    ]
    titles = [
        title_of(column, block.units) if column is not None and name == sets[0] else ""
        for name, column in order
    ]
    sides = [wrapped(name, 76, 9) for name in sets]
    below = wrapped(block.time_label, 120, 7.5)
    height = 0.95 + 0.12 * count_lines([below]) / max(1, len(sets))
    figure, panels = panel_grid(titles, [height], across, left=36 + 12 * count_lines(sides))
    by_place = {}
    for (name, column), axes in zip(order, panels, strict=True):
        if column is None:
            axes.remove()
            continue
        by_place[name, column] = axes
        if axes is not panels[0]:
            axes.sharex(panels[0])
        if name != sets[0]:
            axes.sharey(by_place[sets[0], column])
    # Scales only now: an axis that begins to share takes over the limits but not the transform.
    for column in columns:
        axes = by_place[sets[0], column]
        pool = [values for name in sets for _, values in curves.get((name, column), ())]
        if is_log(np.concatenate([np.zeros(0), *pool]), (block.log or {}).get(column)):
            make_log(axes, "y")
        else:
            axes.locator_params(axis="y", nbins=4)
    if panels:
        panels[0].locator_params(axis="x", nbins=4)
    for (name, column), axes in by_place.items():
        drawn = [(i, t, v) for i, (t, v) in enumerate(curves.get((name, column), ())) if t.size]
        for i, times, values in drawn:
            colour, style = look_of(i)
            axes.plot(
                times, values, color=colour, linestyle=style, marker="o", markersize=2.2,
                linewidth=0.9,
            )  # fmt: skip
        if not drawn:
            say_no_data(axes, keep_axes=True)
        if columns.index(column) % across == 0:
            axes.set_ylabel(sides[sets.index(name)], fontsize=9, parse_math=False)
        if name == sets[-1]:
            axes.set_xlabel(below, fontsize=7.5, parse_math=False)
        else:
            axes.tick_params(labelbottom=False)
    return figure
