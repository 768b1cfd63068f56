"""Columns of DataFrames as float64 arrays, NaN where missing, read alike in all tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Tables = Mapping[str, "pd.DataFrame"]
"""Tables under the names that an error calls them by."""


class Column(NamedTuple):
    """One column of several tables.

    Attributes:
      values: for each table its values `(N,)`, float64: numbers, or codes `0 .. len(categories)-1`
        in the order of the categories. NaN where missing.
      categories: the sorted categories of all the tables, or None for numbers.
    """

    values: tuple[np.ndarray, ...]
    categories: tuple[object, ...] | None


def check_columns(tables: Tables, *columns: str | Sequence[str]) -> None:
    """Checks that columns are in all the tables, and that no table is empty.

    Args:
      tables: the tables.
      *columns: names of columns, and sequences of such names.

    Raises:
      ValueError: a column is missing from a table, or a table has no rows.
    """
    names = [n for part in columns for n in ([part] if isinstance(part, str) else part)]
    for name, frame in tables.items():
        missing = [n for n in names if n not in frame.columns]
        if missing:
            raise ValueError(
                f"{name} has no column {', '.join(map(repr, missing))}: its columns are "
                f"{', '.join(map(str, frame.columns))}"
            )
        if not len(frame):
            raise ValueError(f"{name} has no rows: expected at least one visit")


def check_sequence(name: str, columns: Sequence[str]) -> None:
    """Checks that names of columns are a sequence, not one string, and not none.

    Raises:
      ValueError: they are one string, none, or name a column twice.
    """
    if isinstance(columns, str):
        raise ValueError(f"{name} must be a list of names, got {columns!r}: write [{columns!r}]")
    if not len(columns) or len(set(columns)) < len(columns):
        raise ValueError(
            f"{name} must name at least one column and none twice, got {list(columns)}"
        )


def read(tables: Tables, column: str, categorical: bool = False) -> Column:
    """Reads a column as numbers, or as categories if it holds text or is said to.

    Args:
      tables: the tables.
      column: the name of the column.
      categorical: whether numbers are categories, too.

    Returns:
      The column. Empty text is missing.

    Raises:
      ValueError: a value is infinite, or a date.
    """
    import pandas as pd

    parts = [frame[column].astype(object) for frame in tables.values()]
    joined = pd.concat(parts, ignore_index=True)
    known = joined.notna().to_numpy(copy=True)
    if any(pd.api.types.is_datetime64_any_dtype(frame[column]) for frame in tables.values()):
        raise ValueError(
            f"column {column!r} holds dates: expected numbers or categories, make it a number, "
            "such as the days since the first visit"
        )
    categories, values = None, np.full(len(joined), np.nan)
    try:
        values[known] = pd.to_numeric(joined[known]).to_numpy(np.float64)
    except (ValueError, TypeError):
        text = joined[known].map(_label).to_numpy(object)
        known[known] = text != ""
        kinds, codes = np.unique(text[text != ""], return_inverse=True)
        categories = tuple(kinds)
    else:
        if np.isinf(values).any():
            raise ValueError(f"column {column!r} must be finite or missing, but has infinities")
        known = ~np.isnan(values)
        if categorical:
            kinds, codes = np.unique(values[known], return_inverse=True)
            categories = tuple(kinds.tolist())
    if categories is not None:
        values[known] = codes
    ends = np.cumsum([len(part) for part in parts])
    return Column(tuple(np.split(values, ends[:-1])), categories)


def _label(value: object) -> str:
    # A column of whole numbers and text that lacks values may come as floats in one table.
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)


def read_numbers(tables: Tables, column: str) -> tuple[np.ndarray, ...]:
    """Reads a column of numbers: for each table its observed values, `(n,)`.

    Raises:
      ValueError: the column holds text, or a table has no observed value.
    """
    values, categories = read(tables, column)
    if categories is not None:
        raise ValueError(
            f"column {column!r} must hold numbers, but has text such as {categories[0]!r}: "
            "compare categories by total_variation"
        )
    return observed(tables, column, values)


def read_categories(tables: Tables, column: str) -> tuple[tuple[np.ndarray, ...], int]:
    """Reads a column of categories: for each table its observed codes, and how many there are.

    Raises:
      ValueError: a table has no observed value.
    """
    values, categories = read(tables, column, categorical=True)
    codes = observed(tables, column, values)
    return tuple(v.astype(np.int64) for v in codes), len(categories)


def observed(tables: Tables, column: str, values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Drops the missing of each table's values of a column.

    Raises:
      ValueError: a table has no observed value.
    """
    kept = tuple(v[~np.isnan(v)] for v in values)
    for name, found in zip(tables, kept, strict=True):
        if not len(found):
            raise ValueError(f"column {column!r} of {name} has no observed value to compare")
    return kept


def read_matrix(
    tables: Tables, columns: Sequence[str], categorical: Sequence[str] = ()
) -> tuple[list[np.ndarray], np.ndarray]:
    """Reads columns as matrices.

    Args:
      tables: the tables.
      columns: the names of K columns.
      categorical: those whose numbers are categories; names of other columns do not matter.

    Returns:
      A matrix `(N, K)` for each table, and bool `(K,)`: which columns are categories.
    """
    check_sequence("columns", columns)
    check_columns(tables, columns)
    read_columns = [read(tables, column, column in categorical) for column in columns]
    matrices = [
        np.stack(values, 1) for values in zip(*(c.values for c in read_columns), strict=True)
    ]
    return matrices, np.array([c.categories is not None for c in read_columns])


def patients(tables: Tables, patient: str, at_least: int) -> list[np.ndarray]:
    """Numbers the patients of each table: int64 `(N,)` each, counted on from table to table.

    Raises:
      ValueError: a row has no patient, or a table has too few patients.
    """
    import pandas as pd

    check_columns(tables, patient)
    numbers, start = [], 0
    for name, frame in tables.items():
        codes, names = pd.factorize(frame[patient])
        if (codes < 0).any():
            raise ValueError(
                f"column {patient!r} of {name} names the patient, but is missing in row "
                f"{int(np.argmax(codes < 0))}"
            )
        if len(names) < at_least:
            raise ValueError(f"{name} has {len(names)} patients, expected at least {at_least}")
        numbers.append(codes.astype(np.int64) + start)
        start += len(names)
    return numbers


class Visits(NamedTuple):
    """The order of a table's rows by patient and time.

    Attributes:
      order: the rows, sorted by patient, then time, int64 `(N,)`.
      patient: the number of the patient of each sorted row, int64 `(N,)`.
      time: the time of each sorted row, float64 `(N,)`.
      follows: whether the row after a sorted row is of the same patient, bool `(N-1,)`.
    """

    order: np.ndarray
    patient: np.ndarray
    time: np.ndarray
    follows: np.ndarray


def in_order(name: str, frame: pd.DataFrame, patient: str, time: str) -> Visits:
    """Sorts the visits of a table.

    Raises:
      ValueError: patient or time is missing in a row, or the time is no number.
    """
    tables = {name: frame}
    (number,) = patients(tables, patient, 1)
    check_columns(tables, time)
    (when,), categories = read(tables, time)
    if categories is not None or np.isnan(when).any():
        raise ValueError(f"column {time!r} of {name} must hold the time of each visit as a number")
    order = np.lexsort((when, number))
    number = number[order]
    return Visits(order, number, when[order], number[1:] == number[:-1])
