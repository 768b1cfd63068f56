"""Uses of a codec beyond generation: what inpainting takes as given, and filling in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdiff.data._libraries import require
from jaxdiff.data.tables.channels import (
    Channel,
    Sequences,
    encode_rows,
    places,
    records,
    rounded,
)
from jaxdiff.data.tables.checking import canonical, check_column, check_table
from jaxdiff.data.tables.schema import TableError

if TYPE_CHECKING:
    from pandas import DataFrame

    from jaxdiff.data.tables.codec import Codec


def for_imputation(codec: Codec, sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.known_for_imputation`."""
    _check(codec, sequences)
    indicator = np.array([channel.role == "missing" for channel in codec.channels], bool)
    indicator = indicator & sequences.mask[..., None]
    known_mask = (sequences.observed | indicator) & sequences.mask[..., None]
    values = np.where(indicator, 1.0, sequences.x0)
    return np.where(known_mask, values, 0).astype(np.float32), known_mask


def for_forecast(
    codec: Codec, sequences: Sequences, visits: int | np.ndarray, length: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """See `Codec.known_for_forecast`."""
    _check(codec, sequences)
    num, old = sequences.mask.shape
    visits = np.asarray(visits)
    if visits.shape not in ((), (num,)) or (visits < 0).any():
        raise ValueError(f"visits must be a number or ({num},), not negative, got {visits}")
    lengths = (sequences.lengths + visits).astype(np.int32)
    need = int(lengths.max())
    length = max(old, need) if length is None else length
    if length < need:
        raise ValueError(f"length must be at least {need}, the longest record then, got {length}")
    keep = min(old, length)
    shape = (num, length, len(codec.channels))
    known, known_mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    known[:, :keep], known_mask[:, :keep] = sequences.x0[:, :keep], sequences.observed[:, :keep]
    mask = np.arange(length)[None] < lengths[:, None]
    for number, channel in enumerate(codec.channels):
        if channel.static:
            known[..., number] = sequences.x0[:, :1, number]
            known_mask[..., number] = sequences.observed[:, :1, number]
    known_mask &= mask[..., None]
    return np.where(known_mask, known, 0), known_mask, mask, lengths


def static(
    codec: Codec, values: Mapping[str, Any], num: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """See `Codec.known_static`."""
    vector = codec.static == "vector"
    channels = codec.static_channels if vector else codec.channels
    shape = (num, len(channels)) if vector else (num, length, len(channels))
    known, known_mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for name, value in values.items():
        where, encoded, seen = _encode_values(codec, channels, name, [value])
        known[..., where], known_mask[..., where] = encoded[0], seen[0]
    return known, known_mask


def encode_static(codec: Codec, values: Mapping[str, Any] | DataFrame) -> np.ndarray:
    """See `Codec.encode_static`."""
    if codec.static != "vector":
        raise ValueError(
            f'encode_static is for static="vector", not {codec.static!r}: use known_static'
        )
    pd = require("pandas")
    if isinstance(values, pd.DataFrame):
        return codec.encode(values).static
    lacking = [name for name in codec.schema.statics if name not in values]
    if lacking:
        raise ValueError(f"values must name every static column, and lacks {lacking}")
    lists = {
        name: list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
        for name, value in values.items()
    }
    num = max((len(each) for each in lists.values()), default=1)
    vector = np.zeros((num, len(codec.static_channels)), np.float32)
    for name, each in lists.items():
        if len(each) not in (1, num):
            raise ValueError(f"column {name!r}: {len(each)} values, and others have {num}")
        where, encoded, _ = _encode_values(codec, codec.static_channels, name, each)
        vector[:, where] = encoded
    return vector


def impute(codec: Codec, frame: DataFrame, draws: Any) -> DataFrame:
    """See `Codec.impute`."""
    schema = codec.schema
    table = check_table(frame, schema, unseen="missing")
    _, _, _, lengths = records(table, schema)
    draws = np.asarray(draws)
    if draws.ndim != 4 or draws.shape[1] != len(lengths) or not len(draws):
        raise ValueError(f"draws must be (M, {len(lengths)}, L, C), M > 0, got {draws.shape}")
    stand_in = np.zeros((len(lengths), len(codec.static_channels)))
    for draw in draws:
        codec._check_arrays(draw, lengths, stand_in)
    mask = np.arange(draws.shape[2])[None] < lengths[:, None]
    for column in schema.columns:
        missing = table[column.name].isna().to_numpy()
        if not missing.any() or (column.static and codec.static == "vector"):
            continue
        drawn = [codec._decode(column.name, draw, mask, stand_in)[0][missing] for draw in draws]
        if column.is_real:
            filler = rounded(np.mean(np.array(drawn, np.float64), axis=0), column)
        else:
            votes = [[np.sum(np.array(case, object) == c) for c in column.categories]
                     for case in zip(*drawn, strict=True)]  # fmt: skip
            filler = np.array(column.categories, object)[np.argmax(votes, axis=1)]
        values = table[column.name].astype(object).to_numpy(copy=True)
        values[missing] = filler
        table[column.name] = canonical(values, np.zeros(len(values), bool), column)
    return table


def _check(codec: Codec, sequences: Sequences) -> None:
    """Refuses sequences of another codec."""
    if sequences.x0.shape[-1] != len(codec.channels):
        raise ValueError(
            f"the sequences have {sequences.x0.shape[-1]} channels and the codec "
            f"{len(codec.channels)}: encode the table with this codec"
        )


def _encode_values(
    codec: Codec, channels: tuple[Channel, ...], name: str, values: list[Any]
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Returns where a static column's channels are, what they hold, and what of it is known."""
    if name not in codec.schema.statics:
        raise ValueError(
            f"column {name!r} is not static: the static columns are {list(codec.schema.statics)}"
        )
    column = codec.schema[name]
    pd = require("pandas")
    try:
        series = check_column(pd.Series(values, dtype=object, name=name).infer_objects(), column)
    except TableError as error:
        raise TableError(str(error).replace("row 2, ", "")) from error
    encoded, seen = encode_rows(series, column, dict(codec.transforms), codec.categories)
    return places(channels, name), encoded, seen
