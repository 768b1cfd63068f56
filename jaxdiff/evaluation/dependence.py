"""Whether the columns of a synthetic table hang together as the real ones do.

Spearman's rank correlation of two columns, over the rows in which both are observed, is

    rho(a, b) = corr(rank a, rank b),                                                      (1)

which no skew and no outlier distorts; categories are ranked by their codes, that is, in sorted
order. Two tables are compared by the mean over pairs of different columns

    mean_{a < b} |rho_real(a, b) - rho_synthetic(a, b)|.                                    (2)

Over time, with v_k the k-th visit of a patient, the lag-1 correlation is that of column a at a
visit with column b at the patient's next one, pooled over all patients:

    rho_1(a, b) = corr(rank a(v_k), rank b(v_{k+1})).                                       (3)

Its diagonal is the autocorrelation. It holds both what distinguishes patients and what lasts
within one: a column that is constant in each patient has autocorrelation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxdiff.evaluation import _tables

if TYPE_CHECKING:
    import pandas as pd


class Spread(NamedTuple):
    """One quantity, such as the number of visits, in both tables.

    Attributes:
      ks: the Kolmogorov-Smirnov statistic between them.
      real_mean: the mean in the real table.
      synthetic_mean: the mean in the synthetic one.
      real_median: the median in the real table.
      synthetic_median: the median in the synthetic one.
    """

    ks: float
    real_mean: float
    synthetic_mean: float
    real_median: float
    synthetic_median: float


def rank_correlation(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Computes the matrix of rank correlations, eq. (1).

    Args:
      frame: the table, one row a visit.
      columns: the names of K columns, numbers or categories.

    Returns:
      `(K, K)`, float64, symmetric. NaN where fewer than three rows hold both columns, or one of
      the two is constant in them.

    Raises:
      ValueError: a column is missing.
    """
    (x,), _ = _tables.read_matrix({"frame": frame}, columns)
    return _correlations(x, x)


def correlation_difference(
    real: pd.DataFrame, synthetic: pd.DataFrame, columns: Sequence[str]
) -> float:
    """Computes the mean absolute difference of rank correlations off the diagonal, eq. (2).

    A pair that has no correlation in the real table, for lack of rows or of variation, is left
    out; one that has none in the synthetic table alone counts there as uncorrelated.

    Args:
      real: the real table, one row a visit.
      synthetic: the synthetic table.
      columns: the names of at least two columns, numbers or categories.

    Returns:
      The difference, in [0, 2].

    Raises:
      ValueError: a column is missing, or no pair of columns has a correlation in the real table.
    """
    tables = {"real": real, "synthetic": synthetic}
    (x, y), _ = _tables.read_matrix(tables, columns)
    pairs = np.triu_indices(len(columns), 1)
    expected, found = _correlations(x, x)[pairs], _correlations(y, y)[pairs]
    defined = ~np.isnan(expected)
    if not defined.any():
        raise ValueError(
            f"no pair of {list(columns)} has a correlation in the real table: expected two columns "
            "that vary and are observed together in at least three rows"
        )
    return float(np.abs(expected - np.nan_to_num(found))[defined].mean())


def lag_one(
    frame: pd.DataFrame, columns: Sequence[str], patient: str, time: str
) -> dict[str, float]:
    """Computes the rank autocorrelation between consecutive visits, the diagonal of eq. (3).

    Args:
      frame: the table, one row a visit, in any order.
      columns: the names of the columns, numbers or categories.
      patient: the column that names the patient.
      time: the column of the visit's time, a number.

    Returns:
      The autocorrelation of each column. Visits next to each other in the patient's record count
      however far apart they are; a pair of visits that lacks a value is left out. NaN where fewer
      than three pairs are left, or the column is constant.

    Raises:
      ValueError: a column is missing, or no patient has two visits.
    """
    now, next = _consecutive(frame, columns, patient, time)
    return {column: _correlation(now[:, k], next[:, k]) for k, column in enumerate(columns)}


def lag_one_matrix(
    frame: pd.DataFrame, columns: Sequence[str], patient: str, time: str
) -> np.ndarray:
    """Computes the rank correlations of each column with each one at the next visit, eq. (3).

    Args:
      frame: the table, one row a visit, in any order.
      columns: the names of K columns, numbers or categories.
      patient: the column that names the patient.
      time: the column of the visit's time, a number.

    Returns:
      `(K, K)`, float64: entry (a, b) of column a with column b at the visit after. The diagonal is
      `lag_one`.

    Raises:
      ValueError: a column is missing, or no patient has two visits.
    """
    return _correlations(*_consecutive(frame, columns, patient, time))


def visits(
    real: pd.DataFrame, synthetic: pd.DataFrame, patient: str, time: str
) -> dict[str, Spread]:
    """Compares how often and how regularly patients are seen.

    Args:
      real: the real table, one row a visit, in any order.
      synthetic: the synthetic table.
      patient: the column that names the patient.
      time: the column of the visit's time, a number.

    Returns:
      `"count"`, the number of visits of a patient, and `"gap"`, the time between consecutive
      visits of a patient.

    Raises:
      ValueError: a column is missing, or in one table no patient has two visits.
    """
    from scipy import stats

    counts, gaps = [], []
    for name, frame in {"real": real, "synthetic": synthetic}.items():
        ordered = _in_order(name, frame, patient, time)
        counts.append(np.bincount(ordered.patient))
        gaps.append(np.diff(ordered.time)[ordered.follows])

    def spread(x: np.ndarray, y: np.ndarray) -> Spread:
        return Spread(
            ks=float(stats.ks_2samp(x, y, method="asymp").statistic),
            real_mean=float(x.mean()),
            synthetic_mean=float(y.mean()),
            real_median=float(np.median(x)),
            synthetic_median=float(np.median(y)),
        )

    return {"count": spread(*counts), "gap": spread(*gaps)}


def _in_order(name: str, frame: pd.DataFrame, patient: str, time: str) -> _tables.Visits:
    ordered = _tables.in_order(name, frame, patient, time)
    if not ordered.follows.any():
        raise ValueError(f"no patient of {name} has two visits: expected at least one who has")
    return ordered


def _consecutive(
    frame: pd.DataFrame, columns: Sequence[str], patient: str, time: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the columns at visits and at the visits after them, `(P, K)` each."""
    (x,), _ = _tables.read_matrix({"frame": frame}, columns)
    ordered = _in_order("frame", frame, patient, time)
    x = x[ordered.order]
    return x[:-1][ordered.follows], x[1:][ordered.follows]


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([[_correlation(a, b) for b in y.T] for a in x.T])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Computes eq. (1) over the entries that both have."""
    from scipy import stats

    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 3:
        return float("nan")
    a, b = (stats.rankdata(v[both]) for v in (a, b))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")
