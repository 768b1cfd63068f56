"""Folders of image files."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdiff.data._libraries import require

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""The files that `from_folder` takes for images, in lower case."""


class FolderSource:
    """Image files; they are read and decoded when asked for.

    Attributes:
      files: the files, in the order of the examples.
      labels: the number of each file's class, or None.
      class_names: the names of the classes, or None.
      mode: Pillow's name for the pixels of all images, "L" (grey) or "RGB".
      size: height and width that images are brought to, or None.
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        labels: Sequence[int] | None,
        class_names: Sequence[str] | None,
        mode: str,
        size: int | None,
    ) -> None:
        self.files, self.labels, self.class_names = files, labels, class_names
        self.mode, self.size = mode, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ops = require("PIL.ImageOps")
        with _open_image(self.files[index]) as picture:
            picture = ops.exif_transpose(picture).convert(self.mode)
            if self.size is not None:
                side = min(picture.size)
                left, top = ((length - side) // 2 for length in picture.size)
                picture = picture.crop((left, top, left + side, top + side))
                bicubic = require("PIL.Image").Resampling.BICUBIC
                picture = picture.resize((self.size, self.size), bicubic)
            pixels = np.array(picture)
        example: dict[str, Any] = {"image": pixels[..., None] if pixels.ndim == 2 else pixels}
        if self.labels is not None:
            example["label"] = self.labels[index]
        return example


def from_folder(path: str | os.PathLike[str], size: int | None = None) -> FolderSource:
    """Makes a source of a folder of images.

    Images in the folder itself have no labels. If there are none, its subfolders are the classes,
    numbered in the order of their names. All images become RGB, unless all are grey; transparency
    is dropped.

    Args:
      path: the folder.
      size: height and width that images are brought to: the largest centred square is cut out and
        resized. None keeps them, and they must all have the same size.

    Returns:
      The source, in the order of the names of the files.

    Raises:
      ImportError: Pillow is not installed.
      FileNotFoundError: there is no such folder, or there are no images in it.
      ValueError: a file is no image of 8 bits that can be read, or sizes differ; names the file.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    files, labels, class_names = _images_in(path), None, None
    folders = {sub.name: _images_in(sub, "**/*") for sub in sorted(path.iterdir()) if sub.is_dir()}
    folders = {name: images for name, images in folders.items() if images}
    if files and folders:
        raise ValueError(
            f"{path} holds images both in itself ({files[0].name}, ...) and in subfolders "
            f"({next(iter(folders))}, ...): subfolders are classes, so put all images in them, or "
            "none"
        )
    if folders:
        class_names = tuple(folders)
        labels = [label for label, images in enumerate(folders.values()) for _ in images]
        files = [file for images in folders.values() for file in images]
    if not files:
        raise FileNotFoundError(
            f"there are no images in {path}, nor in its subfolders: their names must end in one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return FolderSource(files, labels, class_names, _common_mode(files, size), size)


def _images_in(path: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    """Returns the images that match, in the order of their names, without hidden files."""
    return sorted(
        file
        for file in path.glob(pattern)
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and file.name[0] != "."
    )


@contextlib.contextmanager
def _open_image(file: pathlib.Path) -> Iterator[Any]:
    """Opens an image; errors, also those of decoding it later, name the file."""
    try:
        with require("PIL.Image").open(file) as picture:
            yield picture
    except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
        raise ValueError(f"cannot read the image {file}: {error}") from error


def _common_mode(files: Sequence[pathlib.Path], size: int | None) -> str:
    """Reads the heads of all files; returns "L" if all are grey, else "RGB"."""
    modes, shapes = set(), {}
    for file in files:
        with _open_image(file) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(
                    f"the image {file} has pixels of mode {picture.mode!r}: convert it to 8 bits"
                )
            modes.add("L" if picture.mode in ("1", "L", "LA", "La") else "RGB")
            turned = size is None and picture.getexif().get(0x0112, 1) >= 5  # Orientation
            shapes.setdefault(picture.size[::-1] if turned else picture.size, file)
    if size is None and len(shapes) > 1:
        (first, first_file), (other, other_file) = list(shapes.items())[:2]
        raise ValueError(
            f"images must have one size, but {first_file} is {first[0]}x{first[1]} and {other_file}"
            f" is {other[0]}x{other[1]}: give size= to crop and resize them"
        )
    return "L" if modes == {"L"} else "RGB"
