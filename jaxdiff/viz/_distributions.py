"""What is drawn of columns: histograms on common bins, shares of categories, curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MOST_CATEGORIES = 12
_MOST_POINTS = 200


class Histograms(NamedTuple):
    """Densities of several sets on common bins."""

    edges: np.ndarray  # (K + 1,)
    heights: dict[str, np.ndarray]  # (K,) each; sets without a finite value are not in it
    log: bool  # whether the bins are equal in the logarithm, and heights are per decade


def histograms(samples: Mapping[str, Any], bins: int = 40, log: bool | None = None) -> Histograms:
    """Computes densities on bins that all sets share (equation 1).

    Args:
      samples: `{set: numbers}`; what is not finite is left out.
      bins: number of bins; fewer for integers within a smaller range.
      log: whether the bins are equal in the logarithm; by default and in doubt as `Densities`
        says.

    Returns:
      The bins and the heights. No bins and no heights if there is no finite value.
    """
    finite = {name: finite_of(values, name) for name, values in samples.items()}
    finite = {name: values for name, values in finite.items() if values.size}
    if not finite:
        return Histograms(np.zeros(0), {}, False)
    pool = np.concatenate(list(finite.values()))
    log = is_log(pool, log)
    low, high = float(pool.min()), float(pool.max())
    if log:
        ends = np.log10([low, high])
        if ends[1] - ends[0] < 1e-9:
            ends += [-0.25, 0.25]  # a single value needs bins as well
        edges = 10 ** np.linspace(*ends, bins + 1)
        # Rounding must not put the extremes outside.
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
        widths = np.diff(np.log10(edges))
    else:
        largest = max(abs(low), abs(high))
        if largest < 1e9 and (pool == np.rint(pool)).all():
            # Other bins would hold now two whole numbers and now three: a comb that means nothing.
            width = max(1, math.ceil((high - low + 1) / bins))
            edges = np.arange(low - 0.5, high + width, width)
        else:
            if high - low <= 1e-9 * largest + 1e-100:
                low, high = low - 0.5 - largest / 20, high + 0.5 + largest / 20
            edges = np.linspace(low, high, bins + 1)
        widths = np.diff(edges)
    heights = {
        name: np.histogram(values, edges)[0] / (values.size * widths)
        for name, values in finite.items()
    }
    return Histograms(edges, heights, log)


def category_shares(
    samples: Mapping[str, Any], categories: Sequence[Any] | None = None, most: int = 12
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Computes the share of each category in each set (equation 2).

    Values are the same category if they are written alike: 1, 1.0 and "1" are one. None, NaN and
    pandas' NA are missing.

    Args:
      samples: `{set: values}`.
      categories: their order; others that occur follow, numbers by size and text by alphabet.
      most: how many are told apart: of more, the commonest, and the others are one bar.

    Returns:
      The categories, last "(n others)" and "(missing)" if there are any, and `{set: shares}`, in
      their order and with sum one; sets without values are not in it.
    """
    counts = {name: Counter(labels_of(values)) for name, values in samples.items()}
    counts = {name: count for name, count in counts.items() if count}
    sizes = {name: count.total() for name, count in counts.items()}
    order = list(dict.fromkeys(labels_of(() if categories is None else categories)))
    seen = {label for count in counts.values() for label in count}
    order += sorted(seen.difference(order), key=by_size)
    order = [label for label in order if label is not None]
    shares = {
        name: {label: count[label] / sizes[name] for label in (*order, None)}
        for name, count in counts.items()
    }
    kept = order
    if len(order) > most:
        # Each set has the same say in what is common, however large it is.
        total = {label: sum(share[label] for share in shares.values()) for label in order}
        common = set(sorted(order, key=lambda label: -total[label])[:most])
        kept = [label for label in order if label in common]
    rest = [label for label in order if label not in set(kept)]
    names = kept + [f"({len(rest)} others)"] * bool(rest) + ["(missing)"] * (None in seen)
    rows = [[label] for label in kept] + [rest] * bool(rest) + [[None]] * (None in seen)
    return names, {
        name: np.array([sum(share[label] for label in row) for row in rows])
        for name, share in shares.items()
    }


def columns_of(groups: Mapping[str, Any]) -> list[str]:
    """Returns the columns of all sets, in the order in which they first appear."""
    for name, group in groups.items():
        if not hasattr(group, "keys"):
            raise TypeError(
                "groups must be {set: {column: values}}; "
                f"set {name!r} is {type(group).__name__}, not a mapping from column to values"
            )
    return list(dict.fromkeys(column for group in groups.values() for column in group))


def numbers_of(values: Any, what: str) -> np.ndarray:
    """Returns values as float64 `(N,)`; `what` names them in the error."""
    try:
        return np.asarray(values, np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be numbers: {error}") from error


def finite_of(values: Any, what: str) -> np.ndarray:
    """Returns the finite ones of values, float64 `(N,)`."""
    values = numbers_of(values, what)
    return values[np.isfinite(values)]


def curve_of(pair: tuple[Any, Any], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times and values of a patient's visits that can be drawn."""
    times, values = (numbers_of(a, what) for a in pair)
    if times.shape != values.shape:
        raise ValueError(
            f"{what} must have times and values of one length, got {times.size} and {values.size}"
        )
    seen = np.isfinite(times) & np.isfinite(values)
    times, values = times[seen], values[seen]
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    if times.size > _MOST_POINTS:
        some = np.linspace(0, times.size - 1, _MOST_POINTS).round().astype(int)
        times, values = times[some], values[some]
    return times, values


def is_log(values: np.ndarray, wanted: bool | None) -> bool:
    """Decides whether an axis is logarithmic."""
    if not values.size or values.min() <= 0:
        return False
    return bool(values.max() > 10 * np.median(values)) if wanted is None else bool(wanted)


def labels_of(values: Any) -> Iterator[str | None]:
    """Yields how values are written; None if they are missing."""
    # Not np.asarray for lists: it would write the NaN among text as "nan".
    for value in np.asarray(values).ravel().tolist() if hasattr(values, "dtype") else values:
        same = value == value
        if value is None or not isinstance(same, (bool, np.bool_)) or not same:
            yield None  # NaN is not itself, and pandas' NA answers neither yes nor no
        elif isinstance(value, (float, np.floating)):
            yield f"{value:.6g}"
        else:
            yield str(value)


def by_size(label: str | None) -> tuple[bool, float, str]:
    """Sorts numbers by size and, after them, text by alphabet."""
    try:
        number = float(label or "")
    except ValueError:
        return True, 0.0, label or ""
    return (False, number, "") if math.isfinite(number) else (True, 0.0, label or "")
