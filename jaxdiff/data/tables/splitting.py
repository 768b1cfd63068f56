"""Dividing the patients of a table, so that some are never trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxdiff.data.tables.schema import Schema

if TYPE_CHECKING:
    from pandas import DataFrame


def split_patients(
    frame: DataFrame, schema: Schema, share: float, seed: int
) -> tuple[DataFrame, DataFrame]:
    """Divides a table by patients: all visits of a patient are in one part.

    Who goes where depends on the seed and the sorted names of the patients: their places in the
    order of random words (Philox, which NumPy promises never to change).

    Args:
      frame: the table, with the schema's patient column.
      schema: what it holds.
      share: the share of patients in the second part, in (0, 1), rounded to whole patients.
      seed: the seed, not negative.

    Returns:
      The two tables, rows in the order of `frame`.

    Raises:
      ValueError: `share` or `seed` is out of range, or a part has no patient.

    Example:
      >>> from jaxdiff.data.tables import pbc
      >>> table, schema = pbc()
      >>> [len(set(part["id"])) for part in split_patients(table, schema, 0.25, seed=0)]
      [234, 78]
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    patients = np.array(sorted(frame[schema.patient].unique()))
    count = round(share * len(patients))
    if not 0 < count < len(patients):
        raise ValueError(
            f"a share of {share} of {len(patients)} patients leaves one part without patients"
        )
    words = np.random.Philox(key=seed).random_raw(len(patients))
    second = frame[schema.patient].isin(patients[np.argsort(words, kind="stable")[:count]])
    return (
        frame[~second].reset_index(drop=True),
        frame[second].reset_index(drop=True),
    )
