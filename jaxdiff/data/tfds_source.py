"""Data sets of TFDS (TensorFlow Datasets), read without TensorFlow."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxdiff.data import digits
from jaxdiff.data._libraries import quiet, require
from jaxdiff.data.sources import stack


class TfdsSource:
    """A split of a prepared TFDS data set; examples are read and decoded when asked for."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _image_and_label(self._records[int(index)])

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns the examples at `indices` `(B,)`, stacked."""
        records = self._records.__getitems__([int(index) for index in indices])
        return stack([_image_and_label(record) for record in records], indices)


def _image_and_label(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("image", "label") if key in record}


def from_tfds(
    name: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None
) -> TfdsSource:
    """Opens a prepared TFDS data set, without TensorFlow and without the network.

    The data set must have been prepared in the `array_record` format. Only "digits", the built-in
    data set, is prepared here when it is missing.

    Args:
      name: the data set, as in `tfds.builder`: "cifar10", "lsun/bedroom", "mnist:3.0.1".
      split: the split, as in TFDS: "train", "test", "train[:80%]".
      data_dir: the data directory of TFDS; None for its default (`$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`).

    Returns:
      The source.

    Raises:
      ImportError: TFDS or array_record is not installed.
      FileNotFoundError: the data set is not prepared; says how to do so.
      ValueError: there is no data set or split of that name; or it has no images, or was prepared
        in a format that cannot be read at random.
    """
    tfds = require("tensorflow_datasets")
    require("array_record")
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    if name == digits.NAME:
        path = digits.prepare(data_dir)
        with quiet():
            builder = tfds.builder_from_directory(path)
    else:
        builder = _prepared_builder(tfds, name, data_dir)
    if "image" not in builder.info.features:
        raise ValueError(
            f'the data set {name!r} has no feature "image", only {sorted(builder.info.features)}'
        )
    try:
        return TfdsSource(builder.as_data_source(split=split))
    except NotImplementedError as error:
        raise ValueError(
            f"the data set {name!r} in {builder.data_dir} is in the format "
            f"{builder.info.file_format.value}, which cannot be read at random: prepare it as "
            f"array_record in another directory, {_how_to_prepare(name, '...')}"
        ) from error
    except ValueError as error:
        splits = list(builder.info.splits)
        raise ValueError(
            f"the data set {name!r} has no split {split!r}: {_nearest(split, splits)} It has "
            f"{', '.join(splits)}, and parts as in {splits[0]}[:80%]"
        ) from error


def _prepared_builder(tfds: ModuleType, name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Returns the builder of a data set that is known and prepared."""
    try:
        with quiet():
            builder = tfds.builder(name, data_dir=data_dir)
            prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError as error:
        known = [*tfds.list_builders(with_community_datasets=False), "digits"]
        raise ValueError(f"TFDS knows no data set {name!r}: {_nearest(name, known)}") from error
    except (AssertionError, ValueError) as error:  # no such version, or no such config
        raise ValueError(str(error)) from error
    if not prepared:
        raise FileNotFoundError(
            f"the data set {name!r} is not prepared: {builder.data_dir} does not hold it. If it is "
            "elsewhere, give data_dir or set TFDS_DATA_DIR. If not, prepare it as array_record "
            "(needs the network and, for most data sets, TensorFlow), "
            f"{_how_to_prepare(name, data_dir)}"
        )
    return builder


def _how_to_prepare(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Returns the command that prepares a data set."""
    where = "" if data_dir is None else f", data_dir='{os.fspath(data_dir)}'"
    return (
        f"with: python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}'{where})"
        ".download_and_prepare(file_format='array_record')\""
    )


def _nearest(name: str, known: Sequence[str]) -> str:
    """Returns the question whether a name that is known was meant."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"did you mean {' or '.join(map(repr, matches))}?"
