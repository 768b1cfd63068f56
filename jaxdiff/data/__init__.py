"""Data: from files to batches.

A *source* gives one example by its number; a *pipeline* turns a source into batches in [-1, 1],
in an order and with augmentations that depend on the seed alone.

    source = in_memory(from_tfds("digits"))
    batches = make_pipeline(source, batch_size=128, seed=0)
    batch = next(batches)                                  # {"x0": (128, 8, 8, 1), "cond": (128,)}

A small data set can reside on the device instead, with the same batches: `resident`.

Tables of visits, such as clinical records, become sequences and are drawn as tables again:
`jaxdiff.data.tables`.

Grain, TFDS, pandas, scikit-learn and Pillow are imported by the functions that need them, never by
this package itself: `pip install "jaxdiff[data]"` brings them.
"""

from jaxdiff.data import digits, sources, tables
from jaxdiff.data.folders import from_folder
from jaxdiff.data.pipeline import make_pipeline
from jaxdiff.data.resident import resident
from jaxdiff.data.sources import Source, from_arrays, from_sequences, in_memory
from jaxdiff.data.tfds_source import from_tfds

__all__ = [
    "Source",
    "digits",
    "from_arrays",
    "from_folder",
    "from_sequences",
    "from_tfds",
    "in_memory",
    "make_pipeline",
    "resident",
    "sources",
    "tables",
]
