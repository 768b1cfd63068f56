"""The built-in clinical data: a trial in primary biliary cholangitis.

312 patients with 1,945 visits, the Mayo Clinic's; `PBC.md` beside this file says more.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.resources
import io
from typing import TYPE_CHECKING

from jaxdiff.data._libraries import require
from jaxdiff.data.tables.inference import infer_schema
from jaxdiff.data.tables.schema import Schema

if TYPE_CHECKING:
    from pandas import DataFrame

UNITS = {
    "futime": "days",
    "age": "years",
    "bili": "mg/dl",
    "chol": "mg/dl",
    "albumin": "g/dl",
    "alk_phos": "U/l",
    "ast": "U/ml",
    "platelet": "1000/ml",
    "protime": "s",
}
"""The units of the columns that have one."""

STATICS = ("futime", "status", "trt", "age", "sex")
"""One value a patient: follow-up and how it ended, treatment arm, age at enrolment, sex."""


def pbc() -> tuple[DataFrame, Schema]:
    """Loads the data, which comes with the package.

    Returns:
      The table, one row a visit, sorted by patient (`id`) and time (`day`); and its schema.
    """
    file = importlib.resources.files("jaxdiff.data.tables").joinpath("pbcseq.csv.gz")
    frame = require("pandas").read_csv(io.BytesIO(gzip.decompress(file.read_bytes())))
    schema = infer_schema(frame, patient="id", time="day")
    for column in schema.columns:
        unit, static = UNITS.get(column.name, ""), column.name in STATICS
        schema = schema.replace(column.name, unit=unit, static=static)
    return frame, dataclasses.replace(schema, time_unit="days")
