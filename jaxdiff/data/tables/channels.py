"""Channels: which parts of a column stand where in an array, and the arithmetic of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxdiff.data.tables.checking import codes_of
from jaxdiff.data.tables.schema import Column, Schema
from jaxdiff.data.tables.transforms import Transform

if TYPE_CHECKING:
    from pandas import DataFrame, Series


class Channel(NamedTuple):
    """What one channel holds.

    Attributes:
      name: the column; `"gap"` or `"start"` for the time.
      role: `"value"` (a number, or a binary's sign), `"category"`, `"missing"`, `"gap"`, `"start"`.
      static: whether it is the same at all visits of a record.
      category: the number of the category (one-hot) or of the bit, the lowest first.
    """

    name: str
    role: str
    static: bool
    category: int = 0


class Sequences(NamedTuple):
    """Records as arrays.

    Attributes:
      x0: `(N, L, C)` float32 in [-1, 1]; 0 on padding.
      mask: `(N, L)` bool, where visits are.
      lengths: `(N,)` int32, visits of each record.
      static: `(N, S)` float32, the static columns; S = 0 unless the codec has static vectors.
      observed: `(N, L, C)` bool, what was really seen: not missing values, nor what fills their
        place, nor the gap before a first visit.
      ids: `(N,)`, the patients.
    """

    x0: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    static: np.ndarray
    observed: np.ndarray
    ids: np.ndarray


def channels_of(
    schema: Schema, transforms: Mapping[str, Transform], gap: Transform, start: Transform,
    categories: str, static: str,
) -> tuple[tuple[Channel, ...], tuple[Channel, ...]]:  # fmt: skip
    """Returns the channels of sequences, and those of static vectors."""
    own = []
    for column in schema.columns:
        count, role = len(column.categories), "category"
        if column.is_real:
            count, role = int(transforms[column.name].method != "constant"), "value"
        elif count <= 2:
            count, role = count - 1, "value"
        elif categories == "bits":
            count = (count - 1).bit_length()
        own += [Channel(column.name, role, column.static, number) for number in range(count)]
        if column.missing:
            own.append(Channel(column.name, "missing", column.static))
    vector = tuple(channel for channel in own if channel.static and static == "vector")
    channels = [channel for channel in own if channel not in vector]
    if gap.method != "constant":
        channels.append(Channel("gap", "gap", False))
    if start.method != "constant":
        channels.append(Channel("start", "start", True))
    return tuple(channels), vector


def records(
    table: DataFrame, schema: Schema
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Splits a sorted table into records.

    Returns:
      The patients `(N,)`; of each row the number of its record and of its visit, both `(rows,)`;
      and the records' lengths `(N,)` int32.
    """
    patients = table[schema.patient].to_numpy()
    new = np.concatenate([[True], patients[1:] != patients[:-1]]).astype(bool)
    firsts, patient = np.flatnonzero(new), np.cumsum(new) - 1
    lengths = np.diff(np.append(firsts, len(patients))).astype(np.int32)
    return patients[firsts], patient, np.arange(len(patients)) - firsts[patient], lengths


def places(channels: Sequence[Channel], name: str) -> list[int]:
    """Returns where the channels of a column are; that of missing values is the last."""
    return [number for number, channel in enumerate(channels)
            if channel.name == name and channel.role not in ("gap", "start")]  # fmt: skip


def encode_rows(
    series: Series, column: Column, transforms: Mapping[str, Transform], categories: str
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a checked column.

    Returns:
      Its channels `(rows, channels)`, 0 where the value is missing; and what was seen, likewise.
    """
    missing = series.isna().to_numpy()
    if not column.is_real:
        encoded = signs(codes_of(series, column)[0], column, categories)
    elif transforms[column.name].method == "constant":
        encoded = np.zeros((len(missing), 0))
    else:
        values = series.to_numpy(np.float64, na_value=np.nan)
        encoded = transforms[column.name].forward(np.where(missing, 1.0, values))[:, None]
    encoded = np.where(missing[:, None], 0.0, encoded)
    seen = np.broadcast_to(~missing[:, None], encoded.shape)
    if column.missing:
        indicator = np.where(missing, -1.0, 1.0)[:, None]
        encoded = np.concatenate([encoded, indicator], axis=1)
        seen = np.concatenate([seen, np.ones_like(indicator, bool)], axis=1)
    return encoded, seen


def signs(codes: np.ndarray, column: Column, categories: str) -> np.ndarray:
    """Returns the code word, -1 and 1, of each category's number: `(n, channels)`."""
    count = len(column.categories)
    if count == 1:
        return np.zeros((len(codes), 0))
    if count == 2:
        return 2.0 * codes[:, None] - 1
    if categories == "one_hot":
        return 2.0 * (codes[:, None] == np.arange(count)[None]) - 1
    bits = (count - 1).bit_length()
    return 2.0 * ((codes[:, None] >> np.arange(bits)[None]) & 1) - 1


def decode_rows(
    rows: np.ndarray, column: Column, transforms: Mapping[str, Transform], categories: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes the channels `(rows, channels)` of a column.

    A category is the one whose code word is nearest: of one-hot channels the largest, of bits
    their signs, unless those are no category's.

    Returns:
      The values `(rows,)`, and a mask of what is missing.
    """
    rows = np.clip(rows, -1, 1)
    missing = np.zeros(len(rows), bool)
    if column.missing:
        missing = rows[:, -1] < 0
        rows = rows[:, :-1]
    if column.is_real:
        encoded = rows[:, 0] if rows.shape[1] else np.zeros(len(rows))
        return rounded(transforms[column.name].inverse(encoded), column), missing
    codes = np.zeros(len(rows), int)
    if rows.shape[1]:
        words = signs(np.arange(len(column.categories)), column, categories)
        codes = (rows @ words.T).argmax(1)  # words are equally long: the nearest is the most alike
    return np.array(column.categories, object)[codes], missing


def rounded(values: np.ndarray, column: Column) -> np.ndarray:
    """Rounds numbers to the column's decimals; those of a positive column stay above 0."""
    decimals = 0 if column.dtype == "int" else column.decimals
    if decimals is None:
        return values
    values = np.round(values, decimals)
    return np.maximum(values, 10.0**-decimals) if column.kind == "positive" else values + 0.0


def carry(x0: np.ndarray, observed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fills unobserved values with the record's previous observed one, else the next, else 0.

    Args:
      x0: `(N, L, C)`.
      observed: `(N, L, C)` bool.
      mask: `(N, L)` bool.

    Returns:
      `(N, L, C)`; 0 on padding.
    """
    length = x0.shape[1]
    places = np.broadcast_to(np.arange(length)[None, :, None], x0.shape)
    before = np.maximum.accumulate(np.where(observed, places, -1), axis=1)
    after = np.minimum.accumulate(np.where(observed, places, length)[:, ::-1], axis=1)[:, ::-1]
    source = np.where(before >= 0, before, after)
    filled = np.take_along_axis(x0, np.minimum(source, length - 1), axis=1)
    return np.where((source < length) & mask[..., None], filled, 0).astype(x0.dtype)


def record_means(x0: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the means `(N, C)` of `x0` `(N, L, C)`, clipped to [-1, 1], over real visits."""
    inside = np.where(mask[..., None], np.clip(x0, -1, 1), 0)
    return inside.sum(1) / mask.sum(1)[:, None]
