"""A codec: from a table of visits to padded sequences for a diffusion model, and back.

Every column takes some channels in [-1, 1]:

- a real: one, by `transforms`; a positive column's numbers stay positive;
- a binary: one, -1 or 1; a categorical with K categories: K (one-hot, 1 for the category and -1
  for the others), or ceil(log2 K) analog bits, -1 or 1 (Chen et al. 2023, "Analog Bits");
- one more, if values may be missing: 1 where the value was observed, -1 where not;
- the time: the gap since the visit before, and where the record starts if that differs.

A column with one value takes no channel, and comes back as it was. A network learns to draw all
channels, the missing ones too, so that what is decoded misses values as the real table does.

    codec = fit_codec(table)
    sequences = codec.encode(table, length=codec.padded_length(8))      # x0 (N, L, C), mask (N, L)
    synthetic = codec.decode(samples, lengths)                          # a table like the first

`fitting` makes codecs, `channels` holds the arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdiff.data._libraries import require
from jaxdiff.data.tables import channels as layout
from jaxdiff.data.tables import known as _known
from jaxdiff.data.tables.channels import Channel, Sequences
from jaxdiff.data.tables.checking import canonical, check_table
from jaxdiff.data.tables.schema import Schema, TableError
from jaxdiff.data.tables.times import decode_times, split_times
from jaxdiff.data.tables.transforms import Transform

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Codec:
    """What turns tables of one schema into arrays and back; made by `fit_codec`.

    Attributes:
      schema: what the tables hold.
      channels: the C channels of `x0`.
      static_channels: the S channels of `static`; none unless `static="vector"`.
      transforms: pairs of a real column's name and its transform.
      gap: the transform of the gaps between visits.
      start: the transform of the first visits' times.
      max_length: the longest record seen, in visits.
      categories: `"one_hot"` or `"bits"`.
      static: where static columns go, `"channels"` or `"vector"`.
      fill: what stands where a value is missing, `"carry"` or `"zero"`.
    """

    schema: Schema
    channels: tuple[Channel, ...]
    static_channels: tuple[Channel, ...]
    transforms: tuple[tuple[str, Transform], ...]
    gap: Transform
    start: Transform
    max_length: int
    categories: str
    static: str
    fill: str

    @property
    def signs(self) -> np.ndarray:
        """`(C,)` bool: which channels are -1 or 1; the others are numbers."""
        return np.array(
            [
                channel.role in ("category", "missing")
                or (channel.role == "value" and not self.schema[channel.name].is_real)
                for channel in self.channels
            ],
            bool,
        )

    def encode(
        self, frame: DataFrame, *, length: int | None = None, unseen: str = "error"
    ) -> Sequences:
        """Encodes a table.

        Args:
          frame: the table; records come out sorted by patient, visits by time.
          length: the sequences' length L; None for the longest record, here or when fitting.
          unseen: `"error"` refuses unknown categories, and values missing where the schema says
            that none are; `"missing"` takes both as missing.

        Returns:
          The sequences.

        Raises:
          TableError: the table does not fit the schema, or a record is longer than `length`.
        """
        table = check_table(frame, self.schema, unseen=unseen)
        ids, patient, visit, lengths = layout.records(table, self.schema)
        longest = int(lengths.max())
        length = max(longest, self.max_length) if length is None else length
        if longest > length:
            whose = ids[int(lengths.argmax())]
            raise TableError(
                f"patient {whose} has {longest} visits, more than length={length}: give a greater "
                "length, or drop visits"
            )
        starts, gaps = split_times(table[self.schema.time].to_numpy(), visit)
        rows, seen = self._encode_rows(table, self.channels, starts, gaps, visit)
        shape = (len(ids), length, len(self.channels))
        x0, observed = np.zeros(shape, np.float32), np.zeros(shape, bool)
        x0[patient, visit], observed[patient, visit] = rows, seen
        mask = np.arange(length)[None] < lengths[:, None]
        if self.fill == "carry":
            values = [channel.role in ("value", "category") for channel in self.channels]
            x0 = np.where(values, layout.carry(x0, observed, mask), x0)
        static = self._encode_rows(table[visit == 0], self.static_channels)[0]
        return Sequences(x0, mask, lengths, static.astype(np.float32), observed, ids)

    def decode(
        self,
        x0: np.ndarray,
        lengths: np.ndarray,
        static: np.ndarray | None = None,
        *,
        ids: Sequence[Any] | np.ndarray | None = None,
        first_id: int = 1,
    ) -> DataFrame:
        """Decodes sequences to a table that fits the schema, whatever the numbers are.

        Args:
          x0: `(N, L, C)`, clipped to [-1, 1].
          lengths: `(N,)`, visits of each record, 1 .. L; what lies behind is ignored.
          static: `(N, S)`, the static columns if `static="vector"`.
          ids: `(N,)`, the patients; None for first_id, first_id + 1, ... (of a schema with text ids
            "S000001", ...).
          first_id: the first patient's number.

        Returns:
          The table, in the schema's dtypes, records in the order of `x0`.

        Raises:
          ValueError: shapes do not fit, or a number is NaN.
        """
        x0, lengths = np.asarray(x0, np.float64), np.asarray(lengths)
        static = self._check_arrays(x0, lengths, static)
        schema, mask = self.schema, np.arange(x0.shape[1])[None] < lengths[:, None]
        patient, _ = np.nonzero(mask)
        data = {schema.patient: self._ids(len(x0), ids, first_id)[patient]}
        data[schema.time] = self._times(x0, mask)
        for column in schema.columns:
            data[column.name] = canonical(*self._decode(column.name, x0, mask, static), column)
        return require("pandas").DataFrame({name: data[name] for name in schema.order})

    def padded_length(self, multiple: int) -> int:
        """Returns `max_length`, rounded up to a multiple: what a network that halves needs."""
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}")
        return -(-self.max_length // multiple) * multiple

    def encode_static(self, values: Mapping[str, Any] | DataFrame) -> np.ndarray:
        """Encodes static columns to the vectors of `static="vector"`.

        Args:
          values: a table; or every static column's value, or sequence of N values (None where
            missing).

        Returns:
          `(N, S)` float32, one row a patient, sorted as `encode` sorts them; N = 1 for values.

        Raises:
          ValueError: the codec has no static vectors, or a column is lacking.
          TableError: a value does not fit the schema.
        """
        return _known.encode_static(self, values)

    def known_for_imputation(self, sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
        """Returns what inpainting may take as given to fill in all missing values.

        All that was observed is known; and every value counts as observed, so that a missing one is
        drawn as if it had been measured.

        Args:
          sequences: from `encode`.

        Returns:
          `known` `(N, L, C)` float32, 0 where unknown, and `known_mask` `(N, L, C)` bool.
        """
        return _known.for_imputation(self, sequences)

    def known_for_forecast(
        self, sequences: Sequences, visits: int | np.ndarray, *, length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns what inpainting may take as given to continue records.

        Args:
          sequences: from `encode`.
          visits: how many visits to add, or `(N,)` to each record.
          length: the new length L'; None for L, or as much more as the records need.

        Returns:
          `known` `(N, L', C)`, `known_mask` `(N, L', C)`: the past with what was missing in it, and
          the static channels throughout; then the new `mask` `(N, L')` and `lengths` `(N,)`.

        Raises:
          ValueError: `visits` is negative, or a continued record is longer than `length`.
        """
        return _known.for_forecast(self, sequences, visits, length)

    def known_static(
        self, values: Mapping[str, Any], num: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns what inpainting may take as given to draw a cohort with some static values.

        Args:
          values: the value of some static columns (None: missing).
          num: how many records, N.
          length: the sequences' length L.

        Returns:
          `known` and `known_mask` `(N, L, C)`: the channels of these columns, at all L places
          (those behind a record's end are padding, which a model ignores). Of a codec with
          `static="vector"`, `(N, S)`: what is known of the vectors.

        Raises:
          ValueError: a column is not static.
          TableError: a value does not fit the schema.
        """
        return _known.static(self, values, num, length)

    def impute(self, frame: DataFrame, draws: Any) -> DataFrame:
        """Fills in a table's missing values from draws of a model.

        Args:
          frame: the table; values missing where the schema says that none are, too.
          draws: `(M, N, L, C)`, M draws for the sequences that `encode(frame, unseen="missing")`
            gives.

        Returns:
          The table, sorted by patient and time: the original values where observed; elsewhere the
          mean of the draws' numbers, rounded, and their most frequent category. Static columns
          stay as they are if `static="vector"`: they are not drawn.

        Raises:
          TableError: the table does not fit the schema.
          ValueError: the draws do not fit the table.
        """
        return _known.impute(self, frame, draws)

    def to_json(self) -> dict[str, Any]:
        """Returns the codec as what `json.dumps` takes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "schema": self.schema.to_json(),
            "channels": [list(channel) for channel in self.channels],
            "static_channels": [list(channel) for channel in self.static_channels],
            "transforms": [[name, transform.to_json()] for name, transform in self.transforms],
            "gap": self.gap.to_json(),
            "start": self.start.to_json(),
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Codec:
        """Returns the codec that `to_json` wrote."""
        return Codec(
            **{
                **fields,
                "schema": Schema.from_json(fields["schema"]),
                "channels": tuple(Channel(*channel) for channel in fields["channels"]),
                "static_channels": tuple(Channel(*c) for c in fields["static_channels"]),
                "transforms": tuple(
                    (name, Transform.from_json(each)) for name, each in fields["transforms"]
                ),
                "gap": Transform.from_json(fields["gap"]),
                "start": Transform.from_json(fields["start"]),
            }
        )

    def _encode_rows(
        self,
        table: DataFrame,
        channels: tuple[Channel, ...],
        starts: np.ndarray | None = None,
        gaps: np.ndarray | None = None,
        visit: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes the rows of a checked table to `(rows, C)`, and says what was observed."""
        shape = (len(table), len(channels))
        values, seen = np.zeros(shape), np.zeros(shape, bool)
        transforms = dict(self.transforms)
        for number, channel in enumerate(channels):
            if channel.role == "gap":
                seen[:, number] = visit > 0
                values[:, number] = self.gap.forward(gaps) * (visit > 0)
            elif channel.role == "start":
                seen[:, number] = True
                values[:, number] = self.start.forward(starts)
        for column in self.schema.columns:
            where = layout.places(channels, column.name)
            if where:
                values[:, where], seen[:, where] = layout.encode_rows(
                    table[column.name], column, transforms, self.categories
                )
        return values, seen

    def _decode(
        self, name: str, x0: np.ndarray, mask: np.ndarray, static: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decodes a column: values `(rows,)`, and a mask of what is missing."""
        column, where = self.schema[name], layout.places(self.channels, name)
        if not column.static:
            rows = x0[mask][:, where]
        else:
            if self.static == "vector":
                records = static[:, layout.places(self.static_channels, name)]
            else:
                records = layout.record_means(x0[..., where], mask)
            rows = np.repeat(records, mask.sum(1), axis=0)
        return layout.decode_rows(rows, column, dict(self.transforms), self.categories)

    def _times(self, x0: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Decodes the times `(rows,)`, strictly increasing within a record."""
        roles = [channel.role for channel in self.channels]
        clipped, visits = np.clip(x0, -1, 1), mask.sum(1)
        gaps = np.zeros(len(np.nonzero(mask)[0]))
        if "gap" in roles:
            gaps = clipped[..., roles.index("gap")][mask]
        starts = np.zeros(len(x0))
        if "start" in roles:
            starts = layout.record_means(clipped[..., [roles.index("start")]], mask)[:, 0]
        return decode_times(self.start.inverse(starts), self.gap.inverse(gaps), visits, self.schema)

    def _ids(self, num: int, ids: Any, first_id: int) -> np.ndarray:
        """Returns the patients' names `(N,)`."""
        text = self.schema.patient_dtype == "str"
        if ids is None:
            numbers = range(first_id, first_id + num)
            ids = [f"S{number:06d}" for number in numbers] if text else numbers
        ids = np.array([str(each) if text else int(each) for each in ids], object if text else int)
        if len(ids) != num or len(set(ids.tolist())) != num:
            raise ValueError(f"ids must be {num} different names, got {len(ids)}: {ids[:5]}...")
        return ids

    def _check_arrays(
        self, x0: np.ndarray, lengths: np.ndarray, static: np.ndarray | None
    ) -> np.ndarray:
        """Checks what is to be decoded; returns the static vectors `(N, S)`."""
        count = len(self.channels)
        if x0.ndim != 3 or x0.shape[-1] != count:
            raise ValueError(f"x0 must be (N, L, {count}), one channel each, got {x0.shape}")
        if lengths.shape != x0.shape[:1] or (
            lengths.size and not 1 <= lengths.min() <= lengths.max() <= x0.shape[1]
        ):
            raise ValueError(
                f"lengths must be ({len(x0)},), each in 1 .. {x0.shape[1]}, got {lengths}"
            )
        shape = (len(x0), len(self.static_channels))
        static = np.zeros(shape) if static is None and not shape[1] else static
        if static is None or np.shape(static) != shape:
            got = None if static is None else np.shape(static)
            raise ValueError(f"static must be {shape}, as codec.encode_static gives it, got {got}")
        mask = np.arange(x0.shape[1])[None] < lengths[:, None]
        bad = np.flatnonzero(np.any(np.isnan(x0) & mask[..., None], axis=(1, 2)))
        if bad.size:
            raise ValueError(f"x0 is NaN in record {bad[0]} ({bad.size} such records)")
        return np.asarray(static, np.float64)
