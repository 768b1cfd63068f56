"""Tables of visits: from long-format clinical records to sequences for a diffusion model, and back.

    table, schema = pbc()                        # or: table = read_table("visits.csv")
    codec = fit_codec(table, schema)             # or: fit_codec(table), with an inferred schema
    sequences = codec.encode(table)              # x0 (N, L, C) in [-1, 1], mask (N, L), lengths
    synthetic = codec.decode(samples, lengths)   # a table with the same columns, dtypes and units
    write_table(synthetic, "synthetic.csv", schema)

pandas and scikit-learn are imported by the functions that need them.
"""

from jaxdiff.data.tables.channels import Channel, Sequences
from jaxdiff.data.tables.checking import check_table
from jaxdiff.data.tables.codec import Codec
from jaxdiff.data.tables.fitting import fit_codec
from jaxdiff.data.tables.inference import infer_schema
from jaxdiff.data.tables.pbc import pbc
from jaxdiff.data.tables.reading import read_table, write_table
from jaxdiff.data.tables.schema import Column, Schema, TableError
from jaxdiff.data.tables.splitting import split_patients
from jaxdiff.data.tables.transforms import Transform

__all__ = [
    "Channel",
    "Codec",
    "Column",
    "Schema",
    "Sequences",
    "TableError",
    "Transform",
    "check_table",
    "fit_codec",
    "infer_schema",
    "pbc",
    "read_table",
    "split_patients",
    "write_table",
]
