"""Whether a synthetic table gives real patients away.

Two records are as far apart as their K columns are in the mean (Gower 1971):

    d(a, b) = (1/K) Σ_k d_k(a_k, b_k),                                                     (1)

    d_k = |F_k(a_k) - F_k(b_k)|  for numbers,  F_k the share of real values below, ties halved,
          0 or 1                 for categories that agree or not,
          0                      if both are missing,
          1                      if one of the two is.

F_k makes a column's scale and skew irrelevant: 1 is the way from the least to the greatest. With
d(a, S) = min_{b in S} d(a, b), the distance to the closest record of S, a cohort made from the
patients T, and H other real patients of the same kind,

    median over synthetic s of d(s, T)  /  median over h in H of d(h, T)                   (2)

is near 1 or above if a synthetic patient is no closer to those it was made from than a stranger is
(Zhao et al. 2021), and 0 if they are copied. The attacker of the membership test (after Chen et al.
2020, where closeness to a sample stands for likelihood) holds real records and the synthetic table
S, and takes for members those that S comes closest to:

    AUC = P(d(t, S) < d(h, S)) + ½ P(d(t, S) = d(h, S)),   t in T, h in H,                 (3)

½ if he only guesses, 1 if he always knows.

A record is one visit, or one whole patient: the static columns, the number of visits, the time from
the first to the last, and of every other column the first and the last observed value and between
them the mean, or for categories the most frequent one (`patient_records`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxdiff.evaluation import _tables

if TYPE_CHECKING:
    import pandas as pd

_CHUNK_VALUES = 2**22  # distances held at a time, a few arrays of 32 MiB


class Privacy(NamedTuple):
    """What the records of a synthetic table tell about those that it was made from.

    Attributes:
      distance: the median distance from a synthetic record to the closest training record.
      real_distance: the same from a held-out real record.
      ratio: distance / real_distance, eq. (2). If real_distance is 0: 1 if distance is, too, else
        infinite.
      copies: the share of synthetic records that equal a training record in every column.
      real_copies: the share of held-out records that do.
      membership_auc: how well an attacker tells training records from held-out ones, eq. (3).
    """

    distance: float
    real_distance: float
    ratio: float
    copies: float
    real_copies: float
    membership_auc: float


def privacy(
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    synthetic: pd.DataFrame,
    patient: str,
    time: str,
    columns: Sequence[str],
    *,
    static: Sequence[str] = (),
    categorical: Sequence[str] = (),
) -> dict[str, Privacy]:
    """Compares the synthetic table's closeness to its training patients with that of strangers.

    Args:
      train: the real table that the synthetic one was made from, one row a visit, in any order.
      held_out: the table of other real patients, best of as many.
      synthetic: the synthetic table.
      patient: the column that names the patient.
      time: the column of the visit's time, a number.
      columns: the columns that change from visit to visit.
      static: those that do not.
      categorical: the columns whose numbers are categories; text always is.

    Returns:
      The numbers for `"visits"`, where a record is one visit with its static columns, and for
      `"patients"`.

    Raises:
      ValueError: a column is missing, or a table has fewer than two patients.
    """
    _check_parts(columns, static)
    tables = {"train": train, "held_out": held_out, "synthetic": synthetic}
    _tables.patients(tables, patient, 2)
    matrices, is_category = _tables.read_matrix(tables, [*columns, *static], categorical)
    records, record_is_category = _summaries(
        tables, patient, time, matrices, is_category, len(columns)
    )
    return {
        "visits": _compare(matrices, is_category),
        "patients": _compare(records, record_is_category),
    }


def patient_records(
    frame: pd.DataFrame,
    patient: str,
    time: str,
    columns: Sequence[str],
    *,
    static: Sequence[str] = (),
    categorical: Sequence[str] = (),
) -> pd.DataFrame:
    """Sums up each patient in one row.

    Args:
      frame: the table, one row a visit, in any order.
      patient: the column that names the patient.
      time: the column of the visit's time, a number.
      columns: the columns that change from visit to visit.
      static: those that do not; their first observed value counts.
      categorical: the columns whose numbers are categories; text always is.

    Returns:
      A row for each patient, in the order of their first rows, indexed by their names: `visits`,
      `span` (the time from the first visit to the last), `NAME_first`, `NAME_mean` or `NAME_mode`
      (of equally frequent ones the lowest) and `NAME_last` of each column, and the static columns.
      Missing where the patient has no observed value.

    Raises:
      ValueError: a column is missing, or the patient or the time of a row.
    """
    import pandas as pd

    _check_parts(columns, static)
    tables = {"frame": frame}
    names = [*columns, *static]
    _tables.check_sequence("columns and static", names)
    _tables.check_columns(tables, names)
    read = [_tables.read(tables, name, name in categorical) for name in names]
    is_category = np.array([column.categories is not None for column in read])
    matrix = np.stack([column.values[0] for column in read], 1)
    (summary,), _ = _summaries(tables, patient, time, [matrix], is_category, len(columns))
    labels = ["visits", "span", *static]
    kinds = [None, None, *(column.categories for column in read[len(columns) :])]
    for name, column in zip(columns, read[: len(columns)], strict=True):
        middle = "mean" if column.categories is None else "mode"
        labels += [f"{name}_first", f"{name}_{middle}", f"{name}_last"]
        kinds += [column.categories] * 3

    def decoded(values: np.ndarray, categories: tuple | None) -> np.ndarray:
        if categories is None:
            return values
        return np.array([np.nan if np.isnan(v) else categories[int(v)] for v in values], object)

    data = {n: decoded(v, k) for n, v, k in zip(labels, summary.T, kinds, strict=True)}
    return pd.DataFrame(data, index=pd.Index(pd.unique(frame[patient]), name=patient))


def closest_record(
    a: pd.DataFrame,
    reference: pd.DataFrame,
    columns: Sequence[str],
    *,
    categorical: Sequence[str] = (),
    scale: pd.DataFrame | None = None,
) -> np.ndarray:
    """Computes the distance of each record to the closest one of a reference, eq. (1).

    Args:
      a: a table of N records, one a row.
      reference: the table of records to search.
      columns: the names of the columns that the distance sees.
      categorical: those whose numbers are categories; text always is.
      scale: the table whose values are counted by F of eq. (1); None: the reference.

    Returns:
      The distances, float64 `(N,)`, in [0, 1].

    Raises:
      ValueError: a column is missing, or a table is empty.

    Example:
      >>> import pandas as pd
      >>> known = pd.DataFrame({"bili": [1.0, 2.0, 30.0, None], "sex": ["m", "f", "f", "f"]})
      >>> closest_record(pd.DataFrame({"bili": [2.0, 2.0], "sex": ["f", "m"]}), known, list(known))
      array([0.        , 0.16666667])
    """
    tables = {"a": a, "reference": reference, "scale": reference if scale is None else scale}
    (x, y, z), is_category = _tables.read_matrix(tables, columns, categorical)
    return _closest(_ranked(x, z, is_category), _ranked(y, z, is_category), is_category)


def membership_auc(
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    synthetic: pd.DataFrame,
    columns: Sequence[str],
    *,
    categorical: Sequence[str] = (),
) -> float:
    """Computes how well an attacker tells the training records from held-out ones, eq. (3).

    Args:
      train: the records that the synthetic ones were made from, one a row: visits, or patients
        (`patient_records`).
      held_out: other real records.
      synthetic: the synthetic records.
      columns: the names of the columns that the attacker sees.
      categorical: those whose numbers are categories; text always is.

    Returns:
      The AUC.

    Raises:
      ValueError: a column is missing, or a table is empty.
    """
    tables = {"train": train, "held_out": held_out, "synthetic": synthetic}
    matrices, is_category = _tables.read_matrix(tables, columns, categorical)
    return _attack(*_all_ranked(matrices, is_category), is_category)


def _check_parts(columns: Sequence[str], static: Sequence[str]) -> None:
    _tables.check_sequence("columns", columns)
    if isinstance(static, str):
        raise ValueError(f"static must be a list of names, got {static!r}: write [{static!r}]")
    both = [name for name in static if name in columns]
    if both:
        raise ValueError(f"static must not name what columns does, but both name {both}")


def _compare(matrices: Sequence[np.ndarray], is_category: np.ndarray) -> Privacy:
    train, held_out, synthetic = _all_ranked(matrices, is_category)
    near = float(np.median(_closest(synthetic, train, is_category)))
    real = float(np.median(_closest(held_out, train, is_category)))
    if real:
        ratio = near / real
    else:
        ratio = float("inf") if near else 1.0
    return Privacy(
        distance=near,
        real_distance=real,
        ratio=ratio,
        copies=_copies(matrices[2], matrices[0]),
        real_copies=_copies(matrices[1], matrices[0]),
        membership_auc=_attack(train, held_out, synthetic, is_category),
    )


def _attack(
    train: np.ndarray, held_out: np.ndarray, synthetic: np.ndarray, is_category: np.ndarray
) -> float:
    from sklearn.metrics import roc_auc_score

    far = [_closest(records, synthetic, is_category) for records in (train, held_out)]
    return float(
        roc_auc_score(np.repeat([1, 0], [len(train), len(held_out)]), -np.concatenate(far))
    )


def _copies(a: np.ndarray, reference: np.ndarray) -> float:
    """Computes the share of the rows of a that are rows of the reference, missing alike."""

    def rows(x: np.ndarray) -> list[tuple]:
        # NaN is not equal to itself, None is.
        return list(map(tuple, np.where(np.isnan(x), None, x.astype(object))))

    known = set(rows(reference))
    return float(np.mean([row in known for row in rows(a)]))


def _all_ranked(matrices: Sequence[np.ndarray], is_category: np.ndarray) -> list[np.ndarray]:
    # Ranks among all real records: members and non-members are measured alike.
    scale = np.concatenate(matrices[:2])
    return [_ranked(x, scale, is_category) for x in matrices]


def _ranked(x: np.ndarray, scale: np.ndarray, is_category: np.ndarray) -> np.ndarray:
    """Replaces numbers by their rank among those of `scale`, from 0 to 1, interpolated."""
    ranked = x.copy()
    for k in np.flatnonzero(~is_category):
        values, counts = np.unique(scale[~np.isnan(scale[:, k]), k], return_counts=True)
        if not len(values):  # nothing to rank among: all observed values are alike
            values, counts = np.zeros(1), np.ones(1)
        ranks = (np.cumsum(counts) - counts / 2) / counts.sum()
        ranked[:, k] = np.interp(x[:, k], values, ranks)  # NaN stays NaN
    return ranked


def _closest(a: np.ndarray, reference: np.ndarray, is_category: np.ndarray) -> np.ndarray:
    """Computes the distances of eq. (1) from ranked records `(N, K)` to the closest of others."""
    step = max(1, _CHUNK_VALUES // len(reference))
    closest = [
        _distances(a[start : start + step], reference, is_category).min(1)
        for start in range(0, len(a), step)
    ]
    return np.concatenate(closest) / a.shape[1]


def _distances(a: np.ndarray, b: np.ndarray, is_category: np.ndarray) -> np.ndarray:
    """Computes the sums over the columns of eq. (1), `(N, M)`."""
    total = np.zeros((len(a), len(b)))
    for k, category in enumerate(is_category):
        difference = np.abs(a[:, k, None] - b[None, :, k])
        if category:
            difference = np.where(difference > 0, 1.0, difference)
        missing = np.isnan(difference)
        if missing.any():
            one = np.isnan(a[:, k, None]) != np.isnan(b[None, :, k])
            difference = np.where(missing, one, difference)
        total += difference
    return total


def _summaries(
    tables: _tables.Tables,
    patient: str,
    time: str,
    matrices: Sequence[np.ndarray],
    is_category: np.ndarray,
    num_dynamic: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Sums up the patients of each table, `(P, 2 + S + 3 D)`, and says what is a category.

    The columns: visits, span, the static ones, then first, mean or mode, and last of each other.
    """
    dynamic, static = is_category[:num_dynamic], is_category[num_dynamic:]
    kinds = np.concatenate([[False, False], static, np.repeat(dynamic, 3)])
    return [
        _summary(_tables.in_order(name, frame, patient, time), x, is_category, num_dynamic)
        for (name, frame), x in zip(tables.items(), matrices, strict=True)
    ], kinds


def _summary(
    ordered: _tables.Visits, x: np.ndarray, is_category: np.ndarray, num_dynamic: int
) -> np.ndarray:
    x, patient = x[ordered.order], ordered.patient
    counts = np.bincount(patient)
    ends = np.cumsum(counts)
    span = ordered.time[ends - 1] - ordered.time[ends - counts]
    parts = [counts.astype(np.float64), span]
    parts += [_first(x[:, k], patient) for k in range(num_dynamic, x.shape[1])]
    for k in range(num_dynamic):
        middle = _mode if is_category[k] else _mean
        last = _first(x[::-1, k], patient[::-1])
        parts += [_first(x[:, k], patient), middle(x[:, k], patient), last]
    return np.stack(parts, 1)


def _first(x: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """Finds the first observed value of each patient, `(P,)`, NaN if there is none."""
    found = np.full(patient.max() + 1, np.nan)
    known = ~np.isnan(x)
    who, where = np.unique(patient[known], return_index=True)
    found[who] = x[known][where]
    return found


def _mean(x: np.ndarray, patient: np.ndarray) -> np.ndarray:
    known, count = ~np.isnan(x), patient.max() + 1
    totals = np.bincount(patient[known], x[known], count)
    numbers = np.bincount(patient[known], minlength=count)
    return np.where(numbers > 0, totals / np.maximum(numbers, 1), np.nan)


def _mode(x: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """Finds the most frequent code of each patient, the lowest of several."""
    known, count = ~np.isnan(x), patient.max() + 1
    if not known.any():
        return np.full(count, np.nan)
    codes = x[known].astype(np.int64)
    table = np.zeros((count, codes.max() + 1), np.int64)
    np.add.at(table, (patient[known], codes), 1)
    return np.where(table.any(1), table.argmax(1), np.nan)
