"""Whether each column of a synthetic table looks like the real one.

With F and G the distribution functions of the observed values, real and synthetic, p and q the
shares of the categories, and s the real standard deviation, the distances of one column are

    Kolmogorov-Smirnov   max_x |F(x) - G(x)|                                               (1)
    Wasserstein          (1/s) ∫ |F(x) - G(x)| dx                                          (2)
    total variation      ½ Σ_k |p_k - q_k|                                                 (3)

each 0 where the distributions agree; (1) and (3) are at most 1. They see observed values alone;
how many are missing is told by `missing_rates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxdiff.evaluation import _tables

if TYPE_CHECKING:
    import pandas as pd


class MissingRate(NamedTuple):
    """The share of missing values of a column.

    Attributes:
      real: in the real table.
      synthetic: in the synthetic one.
      difference: synthetic - real.
    """

    real: float
    synthetic: float
    difference: float


def _pair(real: pd.DataFrame, synthetic: pd.DataFrame, columns: Sequence[str]) -> _tables.Tables:
    tables = {"real": real, "synthetic": synthetic}
    _tables.check_sequence("columns", columns)
    _tables.check_columns(tables, columns)
    return tables


def ks(real: pd.DataFrame, synthetic: pd.DataFrame, columns: Sequence[str]) -> dict[str, float]:
    """Computes the Kolmogorov-Smirnov statistic of columns of numbers, eq. (1).

    Args:
      real: the real table, one row a visit.
      synthetic: the synthetic table.
      columns: the names of the columns.

    Returns:
      The statistic of each column, in [0, 1].

    Raises:
      ValueError: a column is missing, holds text, or has no observed value.

    Example:
      >>> import pandas as pd
      >>> ks(pd.DataFrame({"x": [1, 2, 3, 4]}), pd.DataFrame({"x": [3, 4, 5, None]}), ["x"])
      {'x': 0.5}
    """
    from scipy import stats

    tables = _pair(real, synthetic, columns)
    # Only the statistic is asked for: the exact p-value would be slow on ties and large tables.
    return {
        column: float(
            stats.ks_2samp(*_tables.read_numbers(tables, column), method="asymp").statistic
        )
        for column in columns
    }


def wasserstein(
    real: pd.DataFrame, synthetic: pd.DataFrame, columns: Sequence[str]
) -> dict[str, float]:
    """Computes the Wasserstein-1 distance of columns of numbers, eq. (2).

    Args:
      real: the real table, one row a visit.
      synthetic: the synthetic table.
      columns: the names of the columns.

    Returns:
      The distance of each column in units of the real standard deviation. For a column that is
      constant in the real table it is 0 if the synthetic one is the same constant, else infinite.

    Raises:
      ValueError: a column is missing, holds text, or has no observed value.
    """
    from scipy import stats

    tables = _pair(real, synthetic, columns)

    def distance(column: str) -> float:
        x, y = _tables.read_numbers(tables, column)
        moved = float(stats.wasserstein_distance(x, y))
        # Not x.std(): of a constant such as 0.1 it is 1e-17, not 0.
        if x.min() == x.max():
            return moved and float("inf")
        return moved / float(x.std())

    return {column: distance(column) for column in columns}


def total_variation(
    real: pd.DataFrame, synthetic: pd.DataFrame, columns: Sequence[str]
) -> dict[str, float]:
    """Computes the total variation distance of columns of categories, eq. (3).

    Args:
      real: the real table, one row a visit.
      synthetic: the synthetic table.
      columns: the names of the columns; every distinct value is a category.

    Returns:
      The distance of each column, in [0, 1].

    Raises:
      ValueError: a column is missing, or has no observed value.

    Example:
      >>> import pandas as pd
      >>> real, synthetic = pd.DataFrame({"sex": list("mmff")}), pd.DataFrame({"sex": ["m"]})
      >>> total_variation(real, synthetic, ["sex"])
      {'sex': 0.5}
    """
    tables = _pair(real, synthetic, columns)

    def distance(column: str) -> float:
        codes, count = _tables.read_categories(tables, column)
        p, q = (np.bincount(c, minlength=count) / len(c) for c in codes)
        return float(np.abs(p - q).sum() / 2)

    return {column: distance(column) for column in columns}


def missing_rates(
    real: pd.DataFrame, synthetic: pd.DataFrame, columns: Sequence[str]
) -> dict[str, MissingRate]:
    """Computes the shares of missing values.

    Args:
      real: the real table, one row a visit.
      synthetic: the synthetic table.
      columns: the names of the columns.

    Returns:
      The shares of each column.

    Raises:
      ValueError: a column is missing.
    """
    tables = _pair(real, synthetic, columns)

    def rates(column: str) -> MissingRate:
        p, q = (float(np.isnan(v).mean()) for v in _tables.read(tables, column).values)
        return MissingRate(p, q, q - p)

    return {column: rates(column) for column in columns}


def out_of_range(
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
    columns: Sequence[str],
    *,
    categorical: Sequence[str] = (),
) -> dict[str, float]:
    """Computes the share of synthetic values that no real table could hold.

    Args:
      real: the real table, one row a visit.
      synthetic: the synthetic table.
      columns: the names of the columns.
      categorical: those whose numbers are categories; text always is.

    Returns:
      For each column, of the observed synthetic values, the share outside the range of the real
      ones; for categories, the share of those that are not among the real ones.

    Raises:
      ValueError: a column is missing, or has no observed value.
    """
    tables = _pair(real, synthetic, columns)

    def share(column: str) -> float:
        (x, y), categories = _tables.read(tables, column, column in categorical)
        x, y = _tables.observed(tables, column, (x, y))
        outside = (y < x.min()) | (y > x.max()) if categories is None else ~np.isin(y, x)
        return float(outside.mean())

    return {column: share(column) for column in columns}
