"""Scores with their uncertainties: as a table, in a run's list of them, and in its report.

A record is what one part of an evaluation found: `part`, its name; `scores`, for each of them its
`mean` and its standard `error`, or None where there is none; `plots`, if any, `{name: {"x", "y",
"series"}}` of lines; and whatever else explains it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import runs
from jaxdiff import viz

Record = dict[str, Any]
FILE = "evaluation.json"


def score(mean: float, error: float | None = None) -> dict[str, float | None]:
    """Returns a score of a record."""
    unknown = error is None or not np.isfinite(error)
    return {"mean": float(mean), "error": None if unknown else float(error)}


def append(path: Path, record: Record) -> None:
    """Adds a record to the list that a JSON file holds, or makes the file.

    Raises:
      RunError: the file holds no list.
    """
    runs.write_json(path, [*_read(path), record])


def newest(workdir: Path) -> list[Record]:
    """Returns the newest record of each part that has scores, in the order of the parts.

    Raises:
      RunError: the file of records holds no list.
    """
    found: dict[str, Record] = {}
    for record in _read(workdir / FILE):
        if "scores" in record and "part" in record:
            found[record["part"]] = record
    return list(found.values())


def _read(path: Path) -> list[Record]:
    try:
        records = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        records = None
    if not isinstance(records, list):
        raise runs.RunError(f"{path} holds no list of records: move it away")
    return records


def text(found: Mapping[str, Any]) -> str:
    """Returns a score as text, with as many digits as its error leaves, at least three."""
    mean, error = found["mean"], found["error"]
    if error is None:
        return f"{mean:.4g}"
    digits = max(0, 1 - _exponent(error)) if error > 0 else 4
    if digits > 6:
        return f"{mean:.3g} +- {error:.1g}"
    return f"{mean:.{digits}f} +- {error:.{digits}f}"


def _exponent(number: float) -> int:
    """Returns that of the first digit that counts."""
    return int(f"{number:e}".partition("e")[2])


def lines(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """Returns a table of the records of several runs, side by side.

    Args:
      records: by run; the same parts of each, in the same order.
    """
    rows = rows_of(records)
    names = list(records)
    wide = max(len(name) for name, _ in rows) + 2
    columns = [max(len(name), *(len(cells.get(name, "")) for _, cells in rows)) for name in names]
    told = [" " * wide + "  ".join(f"{n:>{w}}" for n, w in zip(names, columns, strict=True))]
    for name, cells in rows:
        row = "  ".join(f"{cells.get(n, ''):>{w}}" for n, w in zip(names, columns, strict=True))
        told.append(f"{name:{wide}}{row}".rstrip())
    return told


def rows_of(records: Mapping[str, Sequence[Record]]) -> list[tuple[str, dict[str, str]]]:
    """Returns for each score its name, with its part's, and its text by run."""
    rows: dict[str, dict[str, str]] = {}
    for run, of in records.items():
        for record in of:
            for name, found in record["scores"].items():
                rows.setdefault(f"{record['part']}: {name}", {})[run] = text(found)
    return list(rows.items())


def section(workdir: Path) -> list[viz.Section]:
    """Returns the section of a run's report, or none if nothing was evaluated.

    Raises:
      RunError: the file of records holds no list.
    """
    records = [record for record in newest(workdir) if _is_plain(record)]
    if not records:
        return []
    rows = [
        {"score": name, "+- standard error": cells["here"]}
        for name, cells in rows_of({"here": records})
    ]
    blocks: list[Any] = [viz.Table(rows)]
    for record in records:
        if "about" in record:
            blocks.append(f"{record['part']}: {record['about']}")
        for name, plot in record.get("plots", {}).items():
            blocks.append(viz.Lines(plot["series"], plot["x"], plot["y"], caption=name))
    return [viz.Section("Evaluation", blocks)]


def _is_plain(record: Record) -> bool:
    # Not those of tables.
    return all(isinstance(of, dict) and "mean" in of for of in record["scores"].values())
