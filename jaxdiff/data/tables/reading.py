"""Reading and writing tables: CSV, plain or compressed, and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import os
import pathlib
import tempfile
import zlib
from typing import TYPE_CHECKING, Any

from jaxdiff.data._libraries import require
from jaxdiff.data.tables.checking import check_table
from jaxdiff.data.tables.schema import Schema, TableError

if TYPE_CHECKING:
    from pandas import DataFrame, Series

_CSV, _PARQUET = (".csv", ".csv.gz"), (".parquet", ".pq")


def read_table(path_or_frame: str | os.PathLike[str] | DataFrame) -> DataFrame:
    """Reads a table as it stands; `infer_schema` and `check_table` look at what it holds.

    Args:
      path_or_frame: a `.csv`, `.csv.gz`, `.parquet` or `.pq` file; or a DataFrame, which comes back
        as it is.

    Returns:
      The table.

    Raises:
      FileNotFoundError: there is no such file.
      TableError: the file is of another type, or cannot be read as what it should be.
      ImportError: the library for Parquet is not installed.
    """
    pd = require("pandas")
    if isinstance(path_or_frame, pd.DataFrame):
        return path_or_frame
    path = pathlib.Path(os.path.expanduser(path_or_frame))
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}: give the path of a CSV or Parquet file")
    try:
        if suffix in _PARQUET:
            return pd.read_parquet(path)
        return pd.read_csv(path, low_memory=False)
    except ImportError as error:
        raise ImportError(
            f'reading {path} needs pyarrow: pip install "jaxdiff[parquet]"'
        ) from error
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise TableError(f"cannot read {path}: {error}") from error


def write_table(frame: DataFrame, path: str | os.PathLike[str], schema: Schema) -> None:
    """Writes a table; the file appears all at once, and the same table gives the same bytes.

    In CSV, ints with missing values are written as ints ("261", not "261.0"), floats as the
    shortest text that reads as the same number, dates as ISO 8601. A column of ints that may miss
    values but misses none here is written "261.0": so pandas reads it with the dtype that it
    reads where some are missing.

    Args:
      frame: the table.
      path: where to: `.csv`, `.csv.gz`, `.parquet` or `.pq`. What is there is replaced.
      schema: what the table holds.

    Raises:
      TableError: the table does not fit the schema, or the path has another suffix.
      ImportError: the library for Parquet is not installed.
    """
    path = pathlib.Path(os.path.expanduser(path))
    suffix = _suffix(path)
    table = check_table(frame, schema)
    content = _parquet(table) if suffix in _PARQUET else _csv(table, schema)
    if suffix == ".csv.gz":
        content = gzip.compress(content, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _suffix(path: pathlib.Path) -> str:
    """Returns the suffix of a table's path, in lower case."""
    for suffix in (*_CSV, *_PARQUET):
        if path.name.lower().endswith(suffix):
            return suffix
    raise TableError(f"{path}: a table's name ends in {', '.join((*_CSV, *_PARQUET))}")


def _parquet(table: DataFrame) -> bytes:
    """Returns a table as a Parquet file."""
    buffer = io.BytesIO()
    try:
        table.to_parquet(buffer, index=False)
    except ImportError as error:
        raise ImportError(
            'writing Parquet needs pyarrow: pip install "jaxdiff[parquet]"'
        ) from error
    return buffer.getvalue()


def _csv(table: DataFrame, schema: Schema) -> bytes:
    """Returns a table in canonical form as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(schema.order)
    writer.writerows(zip(*(_cells(table[name], schema) for name in schema.order), strict=True))
    return text.getvalue().encode()


def _cells(series: Series, schema: Schema) -> list[Any]:
    """Returns one column as texts."""
    name, missing = series.name, series.isna().to_numpy()
    if name == schema.time and schema.time_dtype == "datetime":
        if schema.time_decimals == 0:
            return series.dt.strftime("%Y-%m-%d").tolist()
        return series.dt.strftime("%Y-%m-%d %H:%M:%S").tolist()
    values = series.astype(object).tolist()
    if name not in (schema.patient, schema.time):
        column = schema[name]
        if column.dtype == "int" and column.missing and not missing.any():
            values = [float(value) for value in values]
    return [
        "" if gone else repr(value) if isinstance(value, float) else str(value)
        for value, gone in zip(values, missing, strict=True)
    ]
