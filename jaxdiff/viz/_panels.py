"""Figures of many small panels: their grid, titles, legend, and what fits where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff.viz._files import load
from jaxdiff.viz.plots import COLOURS, LINE_STYLES, bare

WIDTH = 9.6  # inches: as wide as a report's text


def listed(names: Any) -> str:
    """Returns names as a list in words."""
    return ", ".join(map(str, names)) or "nothing"


def cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cuts a sequence in parts of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def panels_across(number: int) -> int:
    """Returns how many panels stand side by side: at most 4, and the last row well filled."""
    return math.ceil(number / math.ceil(number / 4)) if number else 1


def look_of(i: int) -> tuple[str, str]:
    """Returns colour and line style of set or patient i; after all colours, dashed ones."""
    return COLOURS[i % len(COLOURS)], LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)]


def title_of(column: str, units: Mapping[str, str] | None) -> str:
    """Returns the title of a column's panel, with its unit if it has one."""
    unit = (units or {}).get(column)
    return f"{column} ({unit})" if unit else str(column)


def count_lines(texts: Sequence[str]) -> int:
    """Returns how many lines the tallest text has."""
    return max((text.count("\n") + 1 for text in texts), default=1)


def text_width(text: str) -> float:
    """Returns the width of a line of text, in units of its font's size."""
    font = load("matplotlib.font_manager").FontProperties(size=100)
    measure = load("matplotlib.textpath").text_to_path.get_text_width_height_descent
    return measure(text, font, False)[0] / 100


def wrapped(text: Any, points: float, size: float) -> str:
    """Breaks text of a font's size into lines that are at most so wide, between words if it can."""
    # Other characters than these would make the SVG no XML.
    text = "".join(c if c.isprintable() else " " for c in str(text))
    lines, line = [], ""
    for word in re.split(r"(?<=[\s_/,;:.-])(?=\S)", text):
        if line and text_width(line + word.rstrip()) * size > points:
            lines.append(line)
            line = ""
        for character in word:
            if line and not character.isspace() and text_width(line + character) * size > points:
                lines.append(line)
                line = ""
            line += character
    return "\n".join(part.rstrip() for part in (*lines, line))


def panel_grid(
    titles: Sequence[str], heights: Sequence[float], across: int | None = None, left: float = 46
) -> tuple[Any, list[Any]]:
    """Makes a figure with a panel for each title; without any, one that says so.

    `heights` are those of the panels' insides in inches, one for each row or one for all; `left` is
    the room in points that a panel needs for the labels of its vertical axis.
    """
    across = across or panels_across(len(titles))
    down = max(1, math.ceil(len(titles) / across))
    width = min(3.4, WIDTH / across)
    heights = [*heights, *[heights[-1]] * down][:down] if heights else [1.2]
    titles = [wrapped(title, 72 * width - left - 6, 9) for title in titles]
    extra = sum(count_lines(part) * 0.155 + 0.42 for part in cut(titles, across))
    figure = load("matplotlib.figure").Figure(
        figsize=(width * across, sum(heights) + extra + 0.25),
        dpi=100,
        layout="constrained",
        facecolor="white",
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.07)
    places = figure.add_gridspec(down, across, height_ratios=heights)
    panels = [figure.add_subplot(places[i // across, i % across]) for i in range(len(titles))]
    for axes, title in zip(panels, titles, strict=True):
        bare(axes)
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=7.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_offset_text().set_fontsize(7.5)
    if not panels:
        say_no_data(figure.add_subplot())
    return figure, panels


def say_no_data(axes: Any, keep_axes: bool = False) -> None:
    """Writes into an empty panel that it is."""
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="0.4")
    if not keep_axes:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)


def make_log(axes: Any, which: str) -> None:
    """Makes an axis logarithmic, with plain numbers at its ticks."""
    ticker = load("matplotlib.ticker")
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=6))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def add_legend(figure: Any, handles: list[Any], names: Mapping[str, Any]) -> None:
    """Names the sets once, above all panels."""
    if not handles:
        return
    points = 72 * figure.get_figwidth()
    labels = [wrapped(name, points - 60, 9) for name in names]
    widest = max(text_width(line) for label in labels for line in label.split("\n")) * 9 + 50
    across = max(1, min(len(labels), int(points / widest)))
    lines = sum(count_lines(part) for part in cut(labels, across))
    figure.set_figheight(figure.get_figheight() + 0.17 * lines + 0.1)
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=across, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
