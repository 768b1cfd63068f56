"""Inferring a schema from a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxdiff.data._libraries import require
from jaxdiff.data.tables.checking import Rows, dates_of, plain, texts_of
from jaxdiff.data.tables.schema import DTYPES, Column, Schema, TableError

if TYPE_CHECKING:
    from pandas import DataFrame, Series

PATIENTS = ("id", "patient", "patient_id", "patientid", "pid", "subject", "subject_id", "subjectid",
            "person", "person_id")  # fmt: skip
"""Names of the patient's column, when it is not given; in any case."""

TIMES = ("day", "days", "time", "date", "datetime", "visit", "visit_time", "visit_date",
         "visit_day", "week", "weeks", "month", "months", "year", "years", "hour",
         "hours")  # fmt: skip
"""Names of the time's column, when it is not given; in any case."""

MAX_DECIMALS = 6
"""Numbers with more decimals are not rounded when written."""


def infer_schema(
    frame: DataFrame, *, patient: str | None = None, time: str | None = None,
    max_categories: int = 20,
) -> Schema:  # fmt: skip
    """Infers what the columns of a table hold; edit the result with `Schema.replace`.

    Numbers with at most two values are binary; those with at most five, and whole numbers with at
    most ten, are categorical; all others are positive if above 0, else real. Text is binary with
    two values, else categorical. A column with one value is categorical with one category. A column
    that never changes within a patient is static, if any patient has two visits.

    Args:
      frame: the table, one row a visit.
      patient: the patient's column; None for the one that is called `id`, `patient`, ...
      time: the time's column; None for the one that is called `day`, `time`, `date`, ...
      max_categories: how many values a column of text may have.

    Returns:
      The schema. A column without missing values is taken never to miss any.

    Raises:
      TableError: the patient's or time's column is not to be told, a column is all missing, holds
        dates, or text with too many values (or text among numbers: names the row).
    """
    names = list(frame.columns)
    if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise TableError(f"the table's columns must have distinct texts as names, got {names}")
    if not len(frame):
        raise TableError("the table holds no row: give one row a visit")
    patient = _named(names, patient, PATIENTS, "patient")
    time = _named(names, time, TIMES, "time")
    if patient == time:
        raise TableError(f"the patient and the time cannot both be column {patient!r}")
    rows = Rows(frame)
    whose = np.unique(texts_of(frame[patient])[0].astype(str), return_inverse=True)[1]
    columns = tuple(
        _column(frame[name], whose, rows, max_categories)
        for name in names
        if name not in (patient, time)
    )
    time_dtype, time_decimals = _time(frame[time], rows)
    ids, values, missing = plain(frame[patient])
    whole = ids == "int" or (ids == "float" and _whole(values[~missing]))
    patient_dtype = "int" if whole else "str"
    unit = {"day": "days", "week": "weeks", "month": "months", "year": "years", "hour": "hours"}
    time_unit = "days" if time_dtype == "datetime" else unit.get(time.lower().rstrip("s"), "")
    return Schema(
        patient, time, columns, tuple(names), patient_dtype, time_dtype, time_decimals, time_unit
    )


def _named(names: list[str], given: str | None, known: tuple[str, ...], what: str) -> str:
    """Returns the column of the patient or the time."""
    if given is not None:
        if given not in names:
            raise TableError(f"no column {given!r} for the {what}: there are {names}")
        return given
    found = [name for name in names if name.lower() in known]
    if len(found) != 1:
        problem = f"several could be: {found}" if found else f"none is called one of {list(known)}"
        raise TableError(
            f"which column is the {what}? {problem}. Say so with {what}=; the columns are {names}"
        )
    return found[0]


def _column(series: Series, whose: np.ndarray, rows: Rows, max_categories: int) -> Column:
    """Infers one column."""
    name = str(series.name)
    dtype, values, missing = plain(series)
    if missing.all():
        raise TableError(f"column {name!r}: all {len(values)} values are missing: drop the column")
    known = values[~missing]
    if dtype == "datetime":
        raise TableError(f"column {name!r} holds dates: drop it, or turn it into numbers of days")
    decimals = None
    if dtype in ("int", "float"):
        if not np.all(np.isfinite(known)):
            raise rows.error(~missing & np.isinf(values), name, "the value is infinite")
        decimals = _decimals(known)
        if dtype == "float" and missing.any() and decimals == 0:
            dtype = "int"  # pandas reads ints as floats where values are missing
    distinct = sorted(set(known.tolist()))
    limit = {"str": max_categories, "bool": 2, "int": 10, "float": 5}[dtype]
    common = {
        "name": name,
        "static": _is_static(known, missing, whose),
        "dtype": dtype,
        "decimals": decimals,
        "missing": bool(missing.any()),
    }
    if len(distinct) <= limit:
        categories = tuple(DTYPES[dtype](value) for value in distinct)
        kind = "binary" if len(categories) == 2 else "categorical"
        return Column(kind=kind, categories=categories, **common)
    if dtype == "str":
        raise _too_many(series, values, missing, rows, len(distinct), max_categories)
    return Column(kind="positive" if distinct[0] > 0 else "real", **common)


def _too_many(
    series: Series, values: np.ndarray, missing: np.ndarray, rows: Rows, count: int, limit: int
) -> TableError:
    """Returns the error about a column of text with too many values."""
    odd = _odd(values, missing)
    if odd.sum() < 0.5 * (~missing).sum():
        first = values[np.flatnonzero(odd)[0]]
        return rows.error(odd, str(series.name), f"{first!r} is no number, and most values are")
    return TableError(
        f"column {series.name!r}: text with {count} different values, more than "
        f"max_categories={limit}: drop the column, or raise max_categories"
    )


def _odd(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Says which texts `(rows,)` are no numbers."""
    pd = require("pandas")
    return ~missing & np.isnan(pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(float))


def _is_static(known: np.ndarray, missing: np.ndarray, whose: np.ndarray) -> bool:
    """Says whether a column has one value (or none at all) a patient, of whom some have two rows.

    Args:
      known: the values that are there.
      missing: `(rows,)`, what is missing.
      whose: `(rows,)`, the numbers of the patients, 0 ... N - 1.
    """
    codes = np.full(len(missing), -1)
    codes[~missing] = np.unique(known, return_inverse=True)[1]
    patients, kinds = whose.max() + 1, codes.max() + 2
    pairs = len(np.unique(whose * kinds + codes + 1))
    return bool(pairs == patients < len(codes))


def _decimals(values: np.ndarray) -> int | None:
    """Returns how many decimals the numbers have; None if more than `MAX_DECIMALS`."""
    for decimals in range(MAX_DECIMALS + 1):
        if np.array_equal(np.round(values.astype(np.float64), decimals), values):
            return decimals
    return None


def _whole(values: np.ndarray) -> bool:
    """Says whether all floats are whole numbers."""
    return bool(np.all(np.isfinite(values)) and np.all(values == np.round(values)))


def _time(series: Series, rows: Rows) -> tuple[str, int | None]:
    """Infers the dtype and the decimals of the time."""
    dtype, values, missing = plain(series)
    if missing.all():
        raise TableError(f"column {series.name!r}: all {len(values)} times are missing")
    known = values[~missing]
    if dtype in ("int", "bool"):
        return "int", 0
    if dtype == "float":
        if missing.any() and _whole(known):
            return "int", 0
        return "float", _decimals(known)
    dates = dates_of(series)
    bad = ~missing & np.isnat(dates)
    if dtype == "str" and np.sum(bad) > 0.5 * len(known):
        bad = _odd(values, missing)  # a column of numbers, with some text in it
    if bad.any():
        first = values[np.flatnonzero(bad)[0]]
        raise rows.error(
            bad, str(series.name),
            f"{first!r} is no time: give numbers, or dates as ISO 8601 (1984-02-29) without a zone",
        )  # fmt: skip
    days = dates[~missing].astype("datetime64[D]")
    return "datetime", 0 if np.array_equal(days, dates[~missing]) else None
