"""How well hidden values of a table are filled in, beside what takes no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import realism
from jaxdiff.data import tables

if TYPE_CHECKING:
    from pandas import DataFrame

MODEL, CARRIED, TYPICAL = "model", "last observed", "column mean"
NUMBERS, SQUARED, CATEGORIES = "mean error of numbers", "rms error of numbers", "accuracy"


def hide(
    table: DataFrame, schema: tables.Schema, share: float, seed: int
) -> tuple[DataFrame, np.ndarray]:
    """Hides observed values of the columns that change from visit to visit.

    Which ones depends on the seed and the table: their places in the order of random words
    (Philox, which NumPy promises never to change).

    Args:
      table: in canonical form.
      schema: what it holds.
      share: the share of values to hide, in (0, 1), rounded to whole values.
      seed: the seed.

    Returns:
      The table without them, and where they were: `(rows, columns)` bool, columns as in `numbers`.

    Raises:
      ValueError: `share` is out of range, or nothing is hidden, or nothing of a column is left.
    """
    import pandas as pd

    if not 0 < share < 1:
        raise ValueError(f"--hide must lie in (0, 1), got {share}")
    names = [name for part in realism.columns(schema) for name in part]
    observed = table[names].notna().to_numpy()
    rows, columns = np.nonzero(observed)
    words = np.random.Philox(key=seed).random_raw(len(rows))
    chosen = np.argsort(words, kind="stable")[: round(share * len(rows))]
    if not chosen.size:
        raise ValueError(f"--hide={share} of {len(rows)} observed values hides none: hide more")
    hidden = np.zeros_like(observed)
    hidden[rows[chosen], columns[chosen]] = True
    left = (observed & ~hidden).any(0)
    if not left.all():
        raise ValueError(
            f"column {names[np.argmin(left)]!r}: --hide={share} leaves no value: hide less"
        )
    shown = table.copy()
    for number, name in enumerate(names):
        values = table[name].astype(object).to_numpy(copy=True)
        values[hidden[:, number]] = None
        shown[name] = pd.Series(values, dtype=object, index=table.index)
    return shown, hidden


def numbers(table: DataFrame, schema: tables.Schema) -> np.ndarray:
    """Returns the columns that change: numbers, then the places of categories; NaN if missing.

    Args:
      table: the table.
      schema: what it holds.

    Returns:
      `(rows, columns)` float64, columns in the order of `realism.columns`.
    """
    reals, categories = realism.columns(schema)
    values = [realism.floats(table[name]) for name in reals]
    for name in categories:
        places = {category: place for place, category in enumerate(schema[name].categories)}
        given = zip(table[name].astype(object), table[name].isna(), strict=True)
        values.append(np.array([np.nan if gone else places[v] for v, gone in given], np.float64))
    return np.stack(values, axis=1)


def typical(shown: np.ndarray, num_reals: int) -> np.ndarray:
    """Returns the means of numbers and the most frequent categories of `(rows, columns)`."""
    middle = np.nanmean(shown, axis=0)
    for place in range(num_reals, shown.shape[1]):
        codes = shown[:, place]
        middle[place] = np.bincount(codes[~np.isnan(codes)].astype(int)).argmax()
    return middle


def carried(shown: np.ndarray, patients: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Fills in the patient's last observed value, else the next one, else that of the column.

    Args:
      shown: `(rows, columns)`, NaN where missing; visits in order.
      patients: `(rows,)`.
      otherwise: `(columns,)`.

    Returns:
      `(rows, columns)`.
    """
    import pandas as pd

    frame = pd.DataFrame(shown)
    frame = frame.groupby(patients).ffill().groupby(patients).bfill()
    return np.where(frame.isna(), otherwise[None], frame.to_numpy())


def score(
    table: DataFrame,
    shown: DataFrame,
    filled: DataFrame,
    hidden: np.ndarray,
    schema: tables.Schema,
) -> dict[str, dict[str, Any]]:
    """Returns how far from the truth hidden values are as a model filled them in, and without it.

    Args:
      table: the truth.
      shown: the table without the values that are hidden.
      filled: the same, filled in by a model.
      hidden: `(rows, columns)` bool, which values are hidden.
      schema: what the tables hold.

    Returns:
      Of each way to fill in the means over columns and, in `columns`, the scores of each: mean
      absolute and root mean square error in units of the column's standard deviation, or the share
      of categories that are right. Columns of which nothing is hidden have none.
    """
    reals, categories = realism.columns(schema)
    truth, seen, guess = (numbers(each, schema) for each in (table, shown, filled))
    middle = typical(seen, len(reals))
    patients = table[schema.patient].to_numpy()
    ways = {
        MODEL: guess,
        CARRIED: carried(seen, patients, middle),
        TYPICAL: np.broadcast_to(middle, truth.shape),
    }
    found = {}
    for way, values in ways.items():
        columns: dict[str, dict[str, float]] = {}
        for place, name in enumerate([*reals, *categories]):
            where = hidden[:, place]
            if not where.any():
                continue
            wrong = values[where, place] - truth[where, place]
            if place >= len(reals):
                columns[name] = {CATEGORIES: float(np.mean(wrong == 0))}
            elif spread := np.nanstd(truth[:, place]):
                columns[name] = {
                    NUMBERS: float(np.mean(np.abs(wrong)) / spread),
                    SQUARED: float(np.sqrt(np.mean(wrong**2)) / spread),
                }
        found[way] = {"columns": columns}
        for key in (NUMBERS, SQUARED, CATEGORIES):
            each = [scores[key] for scores in columns.values() if key in scores]
            if each:
                found[way][key] = float(np.mean(each))
    return found


def tell(scores: dict[str, dict[str, Any]]) -> None:
    """Prints scores, a line a column, and the means over columns."""
    columns = scores[MODEL]["columns"]
    wide = max(map(len, [*columns, SQUARED]))

    def line(name: str, key: str, *of: dict[str, float]) -> None:
        print(f"{name:{wide}}" + "".join(f"{each[key]:>15.3f}" for each in of))

    def header(title: str) -> None:
        print(f"{title:{wide}}" + "".join(f"{way:>15}" for way in scores))

    for key, title in ((NUMBERS, "error / std"), (CATEGORIES, "accuracy")):
        if key in scores[MODEL]:
            header(title)
            for name, of in columns.items():
                if key in of:
                    line(name, key, *(each["columns"][name] for each in scores.values()))
    header("mean over columns")
    for key in (NUMBERS, SQUARED, CATEGORIES):
        if key in scores[MODEL]:
            line(key, key, *scores.values())
