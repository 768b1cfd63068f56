"""Checking tables against a schema: errors name the row and the column, as a file shows them.

A row is named by its line in the file, counting the header as line 1: its label in the DataFrame
plus 2 (its position plus 2 where labels are not distinct integers).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdiff.data._libraries import require
from jaxdiff.data.tables.schema import Column, Schema, TableError

if TYPE_CHECKING:
    from pandas import DataFrame, Series

UNSEEN = ("error", "missing")
"""What to do with a value that the schema does not allow for: refuse it, or call it missing."""


def check_table(frame: DataFrame, schema: Schema, *, unseen: str = "error") -> DataFrame:
    """Checks a table against a schema and brings it to canonical form.

    A column may be all missing here if its values may be missing, as they may be in a few records;
    `infer_schema` and `fit_codec` refuse it.

    Args:
      frame: the table, one row a visit, in any order.
      schema: what it must hold.
      unseen: `"error"` refuses unknown categories, and values missing where the schema says that
        none are; `"missing"` takes both as missing.

    Returns:
      A new table, sorted by patient and time, its columns in the schema's order: numbers float64,
      ints int64 (pandas' Int64 where values may be missing), times int64, float64 or datetime64[us]
      without a zone.

    Raises:
      TableError: the table does not fit; the message names the row, the patient and the column.
      ValueError: `unseen` is neither.
    """
    if unseen not in UNSEEN:
        raise ValueError(f"unseen must be one of {UNSEEN}, got {unseen!r}")
    pd = require("pandas")
    _check_names(frame, schema)
    if not len(frame):
        raise TableError("the table holds no row: give one row a visit")
    patients = _patients(frame, schema)
    rows = Rows(frame, patients)
    times = _times(frame, schema, rows)
    data = {schema.patient: patients, schema.time: times}
    for column in schema.columns:
        data[column.name] = _values(frame[column.name], column, rows, unseen)
    table = pd.DataFrame({name: data[name] for name in schema.order})
    order = np.lexsort((times, _ranks(patients)))
    _check_order(schema, rows, patients[order], times[order], order)
    table = table.iloc[order].reset_index(drop=True)
    for name in schema.statics:
        _check_static(table, schema, name, rows, order)
    return table


class Rows:
    """How errors name the rows of a table."""

    def __init__(self, frame: DataFrame, patients: np.ndarray | None = None) -> None:
        index = frame.index
        labelled = index.is_unique and np.issubdtype(np.asarray(index).dtype, np.integer)
        self.lines = (np.asarray(index) if labelled else np.arange(len(frame))) + 2
        self.patients = patients

    def error(self, bad: np.ndarray, column: str, problem: str) -> TableError:
        """Returns the error about the first of the rows `bad`, a mask or positions."""
        bad = np.flatnonzero(bad) if bad.dtype == bool else bad
        whose = "" if self.patients is None else f" (patient {self.patients[bad[0]]})"
        more = f" ({len(bad) - 1} more such rows)" if len(bad) > 1 else ""
        return TableError(f"row {self.lines[bad[0]]}{whose}, column {column!r}: {problem}{more}")


def first(series: Series, bad: np.ndarray) -> Any:
    """Returns the first of the values that a mask `(rows,)` marks, as Python's own type."""
    value = series.iloc[np.flatnonzero(bad)[0]]
    return value.item() if isinstance(value, np.generic) else value


def plain(series: Series) -> tuple[str, np.ndarray, np.ndarray]:
    """Takes a column out of pandas.

    Args:
      series: a column of any dtype.

    Returns:
      What it holds, `"bool"`, `"int"`, `"float"`, `"datetime"` or `"str"`; the values, of dtype
      bool, int64, float64, datetime64 or object (strings), arbitrary where missing; and a mask of
      what is missing.
    """
    pd = require("pandas")
    types = pd.api.types
    missing = series.isna().to_numpy()
    if types.is_datetime64_any_dtype(series):
        if getattr(series.dt, "tz", None) is not None:
            raise TableError(
                f"column {series.name!r}: times with a zone: take it off first, with "
                ".dt.tz_convert('UTC').dt.tz_localize(None)"
            )
        return "datetime", series.to_numpy(), missing
    if types.is_bool_dtype(series) and not isinstance(series.dtype, pd.CategoricalDtype):
        return "bool", series.fillna(False).to_numpy(bool), missing
    if types.is_integer_dtype(series):
        return "int", series.fillna(0).to_numpy(np.int64), missing
    if types.is_float_dtype(series):
        return "float", series.to_numpy(np.float64, na_value=np.nan), missing
    values = series.astype(object).to_numpy()
    known = values[~missing]
    if known.size and all(isinstance(value, (bool, np.bool_)) for value in known):
        return "bool", np.where(missing, False, values).astype(bool), missing
    if known.size and all(isinstance(value, (int, np.integer)) for value in known):
        return "int", np.where(missing, 0, values).astype(np.int64), missing
    numbers = (int, float, np.integer, np.floating)
    if all(isinstance(value, numbers) for value in known):
        return "float", np.where(missing, np.nan, values).astype(np.float64), missing
    texts = np.empty(len(values), object)
    texts[:] = [None if gone else str(value) for value, gone in zip(values, missing, strict=True)]
    return "str", texts, missing


def numbers_of(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Returns a column as float64, NaN where it is no number, and a mask of what is missing."""
    pd = require("pandas")
    kind, values, missing = plain(series)
    if kind == "str":
        values = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float64, copy=True)
    elif kind == "datetime":
        values = np.full(len(values), np.nan)
    values = values.astype(np.float64)
    values[missing] = np.nan
    return values, missing


def texts_of(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Returns a column as strings (ints without a point), and a mask of what is missing."""
    kind, values, missing = plain(series)
    if kind == "float":
        known = values[~missing]
        if np.all(known == np.floor(known)) and np.all(np.abs(known) < 2**53):
            values = np.where(missing, 0, values).astype(np.int64)
    texts = np.empty(len(values), object)
    texts[:] = [None if gone else str(value) for value, gone in zip(values, missing, strict=True)]
    return texts, missing


def dates_of(series: Series) -> np.ndarray:
    """Returns a column of dates (datetimes, or ISO 8601 texts) as datetime64[us]; NaT if none."""
    pd = require("pandas")
    kind, values, missing = plain(series)
    if kind == "str":
        zoned = np.array([bool(re.search(r"(Z|[+-]\d\d:?(\d\d)?)$", str(v)[10:])) for v in values])
        texts = pd.Series(np.where(zoned, None, values))
        values = pd.to_datetime(texts, errors="coerce", format="ISO8601").to_numpy()
    elif kind != "datetime":
        return np.full(len(values), np.datetime64("NaT", "us"))
    return np.where(missing, np.datetime64("NaT", "us"), values.astype("datetime64[us]"))


def _check_names(frame: DataFrame, schema: Schema) -> None:
    """Refuses a table with other columns than the schema's."""
    names = list(frame.columns)
    twice = sorted({name for name in names if names.count(name) > 1})
    lacking = [name for name in schema.order if name not in names]
    extra = [name for name in names if name not in schema.order]
    problems = [
        f"{what} {found}"
        for what, found in (("lacks", lacking), ("also has", extra), ("has twice", twice))
        if found
    ]
    if problems:
        raise TableError(
            f"the table has another schema than the model's: it {', it '.join(problems)}; the "
            f"schema's columns are {list(schema.order)}"
        )


def _patients(frame: DataFrame, schema: Schema) -> np.ndarray:
    """Returns the patients `(rows,)`, int64 or object (strings)."""
    rows, series = Rows(frame), frame[schema.patient]
    if schema.patient_dtype == "str":
        values, missing = texts_of(series)
    else:
        values, missing = numbers_of(series)
        bad = ~missing & ~(np.isfinite(values) & (values == np.round(values)))
        if bad.any():
            got = first(series, bad)
            raise rows.error(bad, schema.patient, f"the schema's patients are ints, got {got!r}")
    if missing.any():
        raise rows.error(missing, schema.patient, "the patient is missing: every row needs one")
    if schema.patient_dtype == "int":
        kind, exact, _ = plain(series)
        return exact if kind == "int" else values.astype(np.int64)
    return values


def _times(frame: DataFrame, schema: Schema, rows: Rows) -> np.ndarray:
    """Returns the times `(rows,)`, int64, float64 or datetime64[us]."""
    series = frame[schema.time]
    if schema.time_dtype == "datetime":
        values, missing = dates_of(series), series.isna().to_numpy()
        valid, expected = ~np.isnat(values), "dates as ISO 8601 (1984-02-29) without a zone"
    else:
        values, missing = numbers_of(series)
        valid, expected = np.isfinite(values), "finite numbers"
        if schema.time_dtype == "int":
            valid, expected = valid & (values == np.round(values)), "whole numbers"
    if missing.any():
        row = np.flatnonzero(missing)[0]
        whole = missing[rows.patients == rows.patients[row]].all()
        problem = (
            "the time is missing, and the patient has no visit at all: drop the patient"
            if whole
            else "the time is missing: give it, or drop the row"
        )
        raise rows.error(missing, schema.time, problem)
    if not valid.all():
        got = first(series, ~valid)
        raise rows.error(~valid, schema.time, f"the schema's times are {expected}, got {got!r}")
    if schema.time_dtype == "datetime":
        coarse = "datetime64[D]" if schema.time_decimals == 0 else "datetime64[s]"
        return values.astype(coarse).astype("datetime64[us]")
    return values.astype(np.int64) if schema.time_dtype == "int" else values


def _values(series: Series, column: Column, rows: Rows, unseen: str) -> Series:
    """Returns one column in canonical form."""
    if column.is_real:
        values, missing = numbers_of(series)
        bad, problem = ~missing & ~np.isfinite(values), "is not a finite number"
        if not bad.any() and column.kind == "positive":
            bad, problem = ~missing & ~(values > 0), "is not above 0, in a positive column"
        if not bad.any() and column.dtype == "int":
            bad, problem = ~missing & (values != np.round(values)), "is not a whole number"
        if bad.any():
            got = first(series, bad)
            raise rows.error(bad, column.name, f"{got!r} {problem}")
    else:
        codes, missing = codes_of(series, column)
        bad = ~missing & (codes < 0)
        if bad.any() and unseen == "error":
            got = first(series, bad)
            raise rows.error(
                bad, column.name, f"unknown category {got!r}: known are {list(column.categories)}"
            )
        missing = missing | bad
        values = np.array([*column.categories, None], object)[np.where(missing, -1, codes)]
    if missing.any() and not column.missing and unseen == "error":
        raise rows.error(missing, column.name, "the value is missing, and the schema allows none")
    return canonical(values, missing, column)


def check_column(series: Series, column: Column) -> Series:
    """Checks one column by itself, as `check_table` does."""
    return _values(series, column, Rows(series.to_frame()), "error")


def codes_of(series: Series, column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of each value's category (-1 if none), and a mask of what is missing."""
    pd = require("pandas")
    if column.dtype == "str":
        values, missing = texts_of(series)
        index = pd.Index(np.array(column.categories, object), dtype=object)
        return index.get_indexer(pd.Index(values, dtype=object)), missing
    if column.dtype == "bool" and plain(series)[0] == "str":
        texts, missing = texts_of(series)
        index = pd.Index([str(value) for value in column.categories], dtype=object)
        return index.get_indexer(pd.Index(texts, dtype=object)), missing
    values, missing = numbers_of(series)
    index = pd.Index(np.array(column.categories, np.float64))
    return np.where(np.isnan(values), -1, index.get_indexer(values)), missing


def canonical(values: np.ndarray, missing: np.ndarray, column: Column) -> Series:
    """Returns values `(rows,)` as a Series of the column's canonical dtype."""
    pd = require("pandas")
    may_miss = column.missing or bool(missing.any())
    if column.dtype == "str":
        series = pd.Series(np.where(missing, None, values), dtype=object)
        return series.astype("str") if int(pd.__version__.split(".")[0]) >= 3 else series
    if column.dtype == "float":
        return pd.Series(np.where(missing, np.nan, values).astype(np.float64))
    kind, nullable = (np.int64, "Int64") if column.dtype == "int" else (bool, "boolean")
    series = pd.Series(np.where(missing, 0, values).astype(kind))
    return series.astype(nullable).mask(missing) if may_miss else series


def _ranks(patients: np.ndarray) -> np.ndarray:
    """Returns the place of each patient among the sorted patients."""
    return np.unique(patients, return_inverse=True)[1]


def _check_order(
    schema: Schema, rows: Rows, patients: np.ndarray, times: np.ndarray, order: np.ndarray
) -> None:
    """Refuses two visits of one patient at one time."""
    same = (patients[1:] == patients[:-1]) & (times[1:] == times[:-1])
    if same.any():
        where = np.flatnonzero(same)
        before, again = order[where], order[where + 1]
        time = times[where[0]]
        if schema.time_dtype == "datetime":
            time = np.datetime_as_string(time, "D" if schema.time_decimals == 0 else "s")
        raise rows.error(
            again,
            schema.time,
            f"two visits of one patient at the same time {time}: also row {rows.lines[before[0]]}",
        )


def _check_static(
    table: DataFrame, schema: Schema, name: str, rows: Rows, order: np.ndarray
) -> None:
    """Refuses a static column that changes within a patient."""
    values, patients = table[name], table[schema.patient].to_numpy()
    gone = values.isna().to_numpy()
    # pandas' NA cannot be compared, None can; two missing values are the same.
    held = np.where(gone, None, values.astype(object).to_numpy())
    changed = np.flatnonzero((patients[1:] == patients[:-1]) & (held[1:] != held[:-1]))
    if changed.size:
        place = changed[0]
        before, after = ("missing" if each is None else each for each in held[place : place + 2])
        raise rows.error(
            order[changed + 1],
            name,
            f"a static column changes within the patient, from {before!r} to {after!r} (row "
            f"{rows.lines[order[place]]}): give one value in all rows of the patient, or make the "
            "column dynamic with schema.replace(name, static=False)",
        )
