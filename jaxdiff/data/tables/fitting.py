"""Fitting a codec to a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxdiff.data.tables.channels import channels_of, records
from jaxdiff.data.tables.checking import check_table
from jaxdiff.data.tables.codec import Codec
from jaxdiff.data.tables.inference import infer_schema
from jaxdiff.data.tables.schema import Schema, TableError
from jaxdiff.data.tables.times import split_times
from jaxdiff.data.tables.transforms import fit_transform

if TYPE_CHECKING:
    from pandas import DataFrame

CATEGORIES, STATIC, FILL = ("one_hot", "bits"), ("channels", "vector"), ("carry", "zero")


def fit_codec(
    frame: DataFrame,
    schema: Schema | None = None,
    *,
    transform: str = "quantile",
    categories: str = "one_hot",
    static: str = "channels",
    fill: str = "carry",
) -> Codec:
    """Fits a codec to a table.

    Args:
      frame: the table.
      schema: what it holds; None to infer it.
      transform: of the reals: `"quantile"`, `"normal_quantile"`, `"yeo_johnson"`, `"box_cox"` (for
        positive columns; real ones get Yeo-Johnson) or `"none"`; then min-max to [-1, 1]. Gaps
        between visits are positive: with either power transform they get Box-Cox, which includes
        the logarithm.
      categories: `"one_hot"` or `"bits"`.
      static: where static columns go: to constant `"channels"`, or to a `"vector"` of conditions.
      fill: what stands where a value is missing: `"carry"`, the patient's last observed value, else
        the next, else 0; or `"zero"`.

    Returns:
      The codec.

    Raises:
      TableError: the table does not fit the schema, or a column is all missing.
      ValueError: an option is unknown.
    """
    for what, given, known in (
        ("categories", categories, CATEGORIES), ("static", static, STATIC), ("fill", fill, FILL),
    ):  # fmt: skip
        if given not in known:
            raise ValueError(f"{what} must be one of {known}, got {given!r}")
    schema = infer_schema(frame) if schema is None else schema
    table = check_table(frame, schema)
    _, _, visit, lengths = records(table, schema)
    transforms = {}
    for column in schema.columns:
        values = table[column.name][visit == 0] if column.static else table[column.name]
        if values.isna().all():
            raise TableError(
                f"column {column.name!r}: all {len(values)} values are missing: drop the column"
            )
        if column.is_real:
            numbers = values.dropna().to_numpy(np.float64)
            positive = column.kind == "positive"
            transforms[column.name] = fit_transform(numbers, transform, positive=positive)
    starts, gaps = split_times(table[schema.time].to_numpy(), visit)
    power = "box_cox" if transform in ("box_cox", "yeo_johnson") else transform
    gaps = gaps[visit > 0] if np.any(visit > 0) else np.ones(1)
    gap = fit_transform(gaps, power, positive=True)
    start = fit_transform(starts[visit == 0], transform, positive=False)
    own, vector = channels_of(schema, transforms, gap, start, categories, static)
    return Codec(
        schema, own, vector, tuple(transforms.items()), gap, start, int(lengths.max()),
        categories, static, fill,
    )  # fmt: skip
