"""Times as a start and gaps: numbers in the time's own unit, of dates days since 1970."""

from __future__ import annotations

import numpy as np

from jaxdiff.data.tables.schema import Schema

_DAY = 86_400_000_000  # microseconds


def split_times(times: np.ndarray, visit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits the times of a sorted table.

    Args:
      times: `(rows,)` int64, float64 or datetime64.
      visit: `(rows,)`, the number of each row's visit in its record.

    Returns:
      Of each row the start of its record, and the gap since the visit before (1 at the first): both
      `(rows,)` float64.
    """
    if np.issubdtype(times.dtype, np.datetime64):
        numbers = times.astype("datetime64[us]").astype(np.int64) / _DAY
    else:
        numbers = times.astype(np.float64)
    firsts = numbers[np.arange(len(times)) - visit]
    gaps = np.where(visit > 0, np.diff(numbers, prepend=0.0), 1.0)
    return firsts, gaps


def decode_times(
    starts: np.ndarray, gaps: np.ndarray, lengths: np.ndarray, schema: Schema
) -> np.ndarray:
    """Adds up starts and gaps, in the resolution of the schema's times.

    Gaps are rounded first, and are at least one unit of that resolution: times within a record
    always increase. (Without a resolution, by at least what float64 can tell apart.)

    Args:
      starts: `(N,)`, of each record.
      gaps: `(rows,)`, before each visit; ignored at the first visits.
      lengths: `(N,)`, visits of each record.
      schema: says what times are.

    Returns:
      The times `(rows,)`: int64, float64 or datetime64[us].
    """
    firsts = np.cumsum(lengths) - lengths
    if schema.time_dtype == "float" and schema.time_decimals is None:
        span = np.abs(starts).max(initial=0) + np.abs(gaps).sum()
        steps, begin = np.maximum(gaps, 4 * np.spacing(span)), starts
    else:
        per_unit = _per_unit(schema)
        steps = np.maximum(np.rint(gaps * per_unit), 1).astype(np.int64)
        begin = np.rint(starts * per_unit).astype(np.int64)
    steps[firsts] = 0
    total = np.cumsum(steps)
    times = np.repeat(begin - total[firsts], lengths) + total
    if schema.time_dtype == "datetime":
        return (times * (_DAY // _per_unit(schema))).astype("datetime64[us]")
    if schema.time_dtype == "float" and schema.time_decimals is not None:
        return np.round(times / _per_unit(schema), schema.time_decimals)
    return times


def _per_unit(schema: Schema) -> int:
    """Returns how many steps of the time's resolution make its unit."""
    if schema.time_dtype == "datetime":
        return 1 if schema.time_decimals == 0 else 86_400
    return 10 ** (schema.time_decimals or 0)
