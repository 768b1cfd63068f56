"""Reports: pages of sections with text, tables, images and plots."""

from __future__ import annotations

import html
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.viz import _html
from jaxdiff.viz._files import PathLike, check_image, write
from jaxdiff.viz.comparisons import (
    Bars,
    Densities,
    Heatmaps,
    Trajectories,
    comparison_svg,
    describe,
)
from jaxdiff.viz.plots import Lines, lines_svg


class Image(NamedTuple):
    """An image in a report.

    Attributes:
      source: uint8 `(H, W)` or `(H, W, C)`, or the path of a PNG file, which is copied in.
      caption: one line under it.
    """

    source: np.ndarray | PathLike
    caption: str = ""


class Table(NamedTuple):
    """A table in a report.

    Attributes:
      rows: sequences of cells, or mappings from column to cell; columns that a row lacks are
        left empty.
      header: names of the columns; mappings bring their own.
      caption: one line above it.
    """

    rows: Sequence[Sequence[Any] | Mapping[str, Any]]
    header: Sequence[str] = ()
    caption: str = ""


class Section(NamedTuple):
    """A section of a report; a plain `(heading, blocks)` does as well.

    Attributes:
      heading: its heading.
      blocks: text (`str`), `Table`, `Image`, `Lines`, or a comparison: `Densities`, `Bars`,
        `Heatmaps` or `Trajectories`. In short: a mapping is a table of two columns (nested ones
        flattened to dotted names), a list is the rows of a table, a uint8 array or a
        `pathlib.Path` is an image.
    """

    heading: str
    blocks: Sequence[Any]


def report_html(
    path: PathLike, *, title: str, sections: Sequence[Section | tuple[str, Sequence[Any]]]
) -> pathlib.Path:
    """Writes a self-contained page of sections with text, tables, images and plots.

    Args:
      path: the file; missing folders are made, an existing file is replaced at once.
      title: the page's heading.
      sections: see `Section`. All text is escaped: nothing in it can be markup.

    Returns:
      The path.

    Raises:
      ImportError: there is an image and Pillow is missing, or a plot and matplotlib is.
      FileNotFoundError: a PNG file does not exist.
      TypeError: a block is of no known kind.
      ValueError: an image has no image's shape, a file is no PNG, the two halves of a series
        differ in length, or a comparison cannot be drawn (see `comparison_svg`).
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, blocks in sections:
        if isinstance(blocks, str):
            raise TypeError(f"blocks of section {heading!r} must be a list, got the string itself")
        content = "\n".join(_block(block, heading) for block in blocks)
        parts.append(f"<section>\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>")
    body = "<main>\n" + "\n".join(parts) + "\n</main>"
    return write(path, _html.page(title, body).encode())


def _block(block: Any, heading: str) -> str:
    """Returns the markup of one block of a report."""
    match block:
        case str():
            return _html.paragraphs(block)
        case Lines():
            names = ", ".join(map(str, block.series))
            alt = f"Line plot of {names}" + (f" against {block.x_label}" if block.x_label else "")
            return _html.figure(lines_svg(block), "svg+xml", alt, block.caption)
        case Densities() | Bars() | Heatmaps() | Trajectories():
            return _html.figure(comparison_svg(block), "svg+xml", describe(block), block.caption)
        case Table():
            return _table(block)
        case Image():
            return _image(block)
        case np.ndarray() | pathlib.PurePath():
            return _image(Image(block))
        case Mapping():
            return _table(Table(list(_flat(block))))
        case list() | tuple():
            return _table(Table(block))
    raise TypeError(
        f"a block of section {heading!r} must be text, a mapping, a list of rows, a uint8 array, "
        f"a pathlib.Path, Table, Image, Lines or a comparison; got {type(block).__name__}"
    )


def _image(block: Image) -> str:
    if not isinstance(block.source, (str, os.PathLike)):
        image = check_image(block.source)
        return _html.pixel_figure(image, block.caption or "image", block.caption, side=192)
    path = pathlib.Path(block.source)
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"an image file of a report must be PNG, {path} is not")
    return _html.figure(data, "png", block.caption or path.stem, block.caption)


def _flat(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of a nested mapping."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(table: Table) -> str:
    header, rows = list(table.header), list(table.rows)
    if any(isinstance(row, Mapping) for row in rows):
        # A dict keeps the order in which columns first appear.
        header = header or list(dict.fromkeys(name for row in rows for name in row))
        rows = [[row.get(name, "") for name in header] for row in rows]
    if not rows:
        return '<p class="hint">No rows.</p>'
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{caption}{head}<tbody>\n{body}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    if getattr(value, "ndim", None) == 0:  # NumPy's and JAX's scalars
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"<td>{html.escape(str(value))}</td>"
    text = str(value) if isinstance(value, int) else f"{value:.6g}"
    return f'<td class="number">{text}</td>'
