"""Schemas: what the columns of a long-format table of visits hold.

A table has one row a visit: a patient, a time, and what was recorded then. Its schema says of every
other column which kind it is (real, positive, binary, categorical), whether it is static (one value
a patient), how its values are written, and whether they may be missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

KINDS = ("real", "positive", "binary", "categorical")
"""What a column can hold: any number, numbers above 0, one of two values, one of some values."""

DTYPES = {"int": int, "float": float, "str": str, "bool": bool}
"""What a value can be, and its Python type."""


class TableError(ValueError):
    """A table that cannot be used; the message names the row and the column."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
      name: its name.
      kind: `"real"`, `"positive"`, `"binary"` or `"categorical"`.
      static: whether it holds one value a patient (sex, treatment arm).
      dtype: what its values are: `"int"`, `"float"`, `"str"` or `"bool"`.
      decimals: to how many decimals a generated number is rounded; None for no rounding.
      categories: the values of a binary or categorical column, sorted; two if binary. A column
        that holds one value only is categorical with one category.
      missing: whether values may be missing.
      unit: the unit, for reports.
    """

    name: str
    kind: str
    static: bool = False
    dtype: str = "float"
    decimals: int | None = None
    categories: tuple[Any, ...] = ()
    missing: bool = False
    unit: str = ""

    def __post_init__(self) -> None:
        where = f"column {self.name!r}"
        object.__setattr__(self, "categories", tuple(self.categories))
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind must be one of {KINDS}, got {self.kind!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{where}: dtype must be one of {tuple(DTYPES)}, got {self.dtype!r}")
        if self.is_real:
            if self.dtype not in ("int", "float"):
                raise ValueError(
                    f"{where}: a {self.kind} column holds ints or floats, not {self.dtype!r}: make "
                    'it "categorical", or turn its values into numbers first'
                )
            if self.categories:
                raise ValueError(f"{where}: a {self.kind} column has no categories")
            return
        bad = [value for value in self.categories if type(value) is not DTYPES[self.dtype]]
        if bad:
            raise ValueError(
                f"{where}: the categories must be of dtype {self.dtype!r}, got {bad[0]!r}"
            )
        if len(set(self.categories)) != len(self.categories) or not self.categories:
            raise ValueError(
                f"{where}: the categories must be at least one and distinct, got {self.categories}"
            )
        if self.kind == "binary" and len(self.categories) != 2:
            raise ValueError(f"{where}: binary means two categories, got {self.categories}")
        object.__setattr__(self, "categories", tuple(sorted(self.categories)))

    @property
    def is_real(self) -> bool:
        """Whether it holds numbers, rather than one of some values."""
        return self.kind in ("real", "positive")


@dataclass(frozen=True)
class Schema:
    """What a table of visits holds.

    Attributes:
      patient: the column that says whose visit it is.
      time: the column that says when it was.
      columns: all the others, in the file's order.
      order: all names, in the file's order.
      patient_dtype: `"int"` or `"str"`.
      time_dtype: `"int"`, `"float"` or `"datetime"`.
      time_decimals: to how many decimals times are rounded, 0 for ints; None for no rounding. Of
        datetimes: 0 for whole days, None for days and times of day, to the second.
      time_unit: the unit of time, for reports; gaps between datetimes are counted in days.
    """

    patient: str
    time: str
    columns: tuple[Column, ...]
    order: tuple[str, ...]
    patient_dtype: Literal["int", "str"]
    time_dtype: Literal["int", "float", "datetime"]
    time_decimals: int | None
    time_unit: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "order", tuple(self.order))
        names = [self.patient, self.time, *(column.name for column in self.columns)]
        if len(set(names)) != len(names):
            raise ValueError(f"a schema's columns must have distinct names, got {names}")
        if sorted(names) != sorted(self.order):
            raise ValueError(f"order must hold the names {names}, got {list(self.order)}")
        if self.patient_dtype not in ("int", "str"):
            raise ValueError(f'patient_dtype must be "int" or "str", got {self.patient_dtype!r}')
        if self.time_dtype not in ("int", "float", "datetime"):
            raise ValueError(
                f'time_dtype must be "int", "float" or "datetime", got {self.time_dtype!r}'
            )

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(
            f"no column {name!r} besides the patient's and the time's: there are "
            f"{[column.name for column in self.columns]}"
        )

    def replace(self, name: str, /, **changes: Any) -> Schema:
        """Returns the schema with one column changed.

        Args:
          name: the column.
          **changes: fields of `Column` and what they shall be. The categories go by themselves
            when the kind becomes real or positive.

        Returns:
          The new schema.

        Raises:
          KeyError: there is no such column.
          ValueError: the changed column contradicts itself.
        """
        if changes.get("kind") in ("real", "positive"):
            changes = {"categories": (), **changes}
        new = dataclasses.replace(self[name], **changes)
        columns = tuple(new if column.name == name else column for column in self.columns)
        order = tuple(new.name if other == name else other for other in self.order)
        return dataclasses.replace(self, columns=columns, order=order)

    @property
    def reals(self) -> tuple[str, ...]:
        """The names of the real and positive columns."""
        return tuple(column.name for column in self.columns if column.is_real)

    @property
    def categoricals(self) -> tuple[str, ...]:
        """The names of the binary and categorical columns."""
        return tuple(column.name for column in self.columns if not column.is_real)

    @property
    def statics(self) -> tuple[str, ...]:
        """The names of the columns with one value a patient."""
        return tuple(column.name for column in self.columns if column.static)

    def to_json(self) -> dict[str, Any]:
        """Returns the schema as what `json.dumps` takes."""
        fields = dataclasses.asdict(self)
        for column in fields["columns"]:
            column["categories"] = list(column["categories"])
        return {**fields, "columns": list(fields["columns"]), "order": list(self.order)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Schema:
        """Returns the schema that `to_json` wrote."""
        columns = tuple(Column(**column) for column in fields["columns"])
        return Schema(**{**fields, "columns": columns, "order": tuple(fields["order"])})
