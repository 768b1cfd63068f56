"""The built-in data set: hand-written digits, 8 by 8 pixels, which need no download.

The 1,797 images are the test part of the UCI "Optical Recognition of Handwritten Digits" data, of
which scikit-learn carries a copy. Its pixels count the ink in blocks of 4 by 4 bits, 0 to 16; ours
are `(255 * count + 8) // 16`: counts times 255/16, rounded to nearest, halves upwards.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from jaxdiff.data._libraries import quiet, require

NAME = "digits"
VERSION = "1.0.0"

_DESCRIPTION = """\
1,797 hand-written digits of 13 people, 8 by 8 pixels: the test part of the UCI "Optical Recognition
of Handwritten Digits" data, as scikit-learn carries it. Pixels are scaled from 0..16 to 0..255 by
(255 * value + 8) // 16."""

_CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}"""


def prepare(data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Writes the digits as a TFDS data set, unless they are there already.

    Needs neither the network nor TensorFlow. The data set appears all at once, by a rename: it may
    be prepared by any number of processes at the same time.

    Args:
      data_dir: the data directory of TFDS; None for its default (`$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`).

    Returns:
      The directory of the data set, for `tfds.builder_from_directory`.

    Raises:
      ImportError: TFDS or scikit-learn is not installed.
      OSError: the data set cannot be written there.
    """
    builder_cls = _builder_cls()
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    with quiet():
        builder = builder_cls(data_dir=data_dir)
        path = pathlib.Path(builder.data_dir)
        if builder.is_prepared():
            return path
        if "://" in str(builder.data_dir):
            raise OSError(f"cannot write the digits to {builder.data_dir}: give a local data_dir")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".preparing-") as staging:
                _write(builder_cls, pathlib.Path(staging)).rename(path)
        except OSError as error:
            if builder.is_prepared():  # another process was first
                return path
            raise OSError(
                f"cannot write the digits data set to {path} ({error}): give data_dir, or set "
                "TFDS_DATA_DIR, to a directory that can be written to"
            ) from error
    return path


def _write(builder_cls: type, root: pathlib.Path) -> pathlib.Path:
    """Prepares the data set below `root`; returns its directory."""
    tfds = require("tensorflow_datasets")
    builder = builder_cls(data_dir=root, file_format="array_record")
    builder.download_and_prepare(
        download_dir=root / "downloads",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    return pathlib.Path(builder.data_dir)


def _builder_cls() -> type:
    """Returns the TFDS builder; it is made here because its base class needs TFDS imported."""
    tfds = require("tensorflow_datasets")

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Hand-written digits, 8 by 8 pixels."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        url_infos = None  # nothing is downloaded

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=_DESCRIPTION,
                citation=_CITATION,
                homepage="https://doi.org/10.24432/C50P49",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(8, 8, 1)),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # the order of the original
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            image = require("PIL.Image")
            bunch = require("sklearn.datasets").load_digits()
            pixels = ((255 * bunch.images.astype("int64") + 8) // 16).astype("uint8")
            for index, (picture, label) in enumerate(zip(pixels, bunch.target, strict=True)):
                # TFDS encodes arrays with TensorFlow, but Pillow's images with Pillow.
                yield index, {"image": image.fromarray(picture), "label": int(label)}

    return Digits
