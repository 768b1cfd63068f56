"""Sources: data sets that give one example by its number, and those in memory.

A source is anything with `len(source)` and `source[i] -> {"image": uint8 (H, W, C), "label": int}`
(the label may be missing), so a list of such dictionaries is one. A source may also have
`gather(indices) -> {"image": uint8 (B, H, W, C), "label": (B,)}`, which fetches many at once; the
pipeline prefers it.

A source of sequences gives `{"x0": float32 (L, C), "mask": bool (L, 1), "cond": {...}}` instead, in
[-1, 1] already: the pipeline brings them into order and changes nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxdiff.data._libraries import require

MAX_BYTES = 4 * 2**30
"""How large `in_memory` lets a data set become, unless told otherwise: 4 GiB of pixels."""


class Source(Protocol):
    """A data set that gives one example by its number."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns `{"image": uint8 (H, W, C), "label": int}`; the label may be missing."""
        ...


def gather(source: Source, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Fetches examples from any source.

    Args:
      source: the source.
      indices: `(B,)`, which examples.

    Returns:
      `{"image": uint8 (B, H, W, C)}`, and `"label"`, int32 `(B,)`, if the source has labels.

    Raises:
      ValueError: an image is not uint8 `(H, W, C)`, or the images differ in shape.
    """
    if hasattr(source, "gather"):
        return source.gather(indices)
    return stack([source[int(index)] for index in indices], indices)


def check_image(image: Any, name: str) -> np.ndarray:
    """Returns the image as an array, which must be uint8 `(*spatial, C)` with 1 to 3 spatial axes.

    Raises:
      ValueError: it is not; says so of the image called `name`.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or not 2 <= image.ndim <= 4:
        raise ValueError(
            f"{name} must be uint8 of shape (H, W, C), got {image.dtype} of shape {image.shape}: "
            "give pixels as 0..255, with an axis for the channels; the pipeline scales them"
        )
    return image


def stack(
    examples: Sequence[Mapping[str, Any]], indices: Sequence[int] | np.ndarray
) -> dict[str, np.ndarray]:
    """Stacks examples to arrays, and checks that they can be."""
    images = [
        check_image(example["image"], f"image {index}")
        for example, index in zip(examples, indices, strict=True)
    ]
    for image, index in zip(images, indices, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"all images must have one shape, but image {indices[0]} has {images[0].shape} and "
                f"image {index} has {image.shape}: bring them to one size first, for a folder with "
                "from_folder(path, size=...)"
            )
    batch = {"image": np.stack(images)}
    if "label" in examples[0]:
        batch["label"] = np.asarray([example["label"] for example in examples], np.int32)
    return batch


class ArraySource:
    """A source in memory.

    Attributes:
      images: uint8 `(N, H, W, C)`.
      labels: int32 `(N,)`, or None.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.labels is None:
            return {"image": self.images[index]}
        return {"image": self.images[index], "label": int(self.labels[index])}

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns the examples at `indices` `(B,)`, stacked."""
        indices = np.asarray(indices)
        if self.labels is None:
            return {"image": self.images[indices]}
        return {"image": self.images[indices], "label": self.labels[indices]}


def from_arrays(images: np.ndarray, labels: np.ndarray | None = None) -> ArraySource:
    """Makes a source of arrays.

    Args:
      images: uint8 `(N, H, W, C)`, or `(N, D, H, W, C)` for volumes. Not copied.
      labels: integers `(N,)`, or None.

    Returns:
      The source.

    Raises:
      ValueError: a shape or a type is wrong, or there are no images.

    Example:
      >>> source = from_arrays(np.zeros((5, 8, 8, 1), np.uint8), labels=np.arange(5))
      >>> len(source), source[3]["image"].shape, source[3]["label"]
      (5, (8, 8, 1), 3)
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8, got {images.dtype}: give pixels as 0..255; the pipeline scales "
            "them to [-1, 1]"
        )
    if images.ndim not in (4, 5):
        cure = ": for grey images give images[..., None]" if images.ndim == 3 else ""
        raise ValueError(
            f"images must be (N, H, W, C) or (N, D, H, W, C), got shape {images.shape}{cure}"
        )
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {images.shape}")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be integers of shape {images.shape[:1]}, one per image, got "
                f"{labels.dtype} of shape {labels.shape}"
            )
        labels = labels.astype(np.int32)
    return ArraySource(images, labels)


class SequenceSource:
    """Sequences in memory, which reach the train step as they are; made by `from_sequences`.

    Attributes:
      arrays: what a batch consists of, a pytree of arrays `(N, ...)`.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["x0"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _take(self.arrays, index)

    def gather(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Returns the examples at `indices` `(B,)`, stacked."""
        return _take(self.arrays, np.asarray(indices))


def _take(arrays: Mapping[str, Any], indices: int | np.ndarray) -> dict[str, Any]:
    return {
        key: _take(value, indices) if isinstance(value, Mapping) else value[indices]
        for key, value in arrays.items()
    }


def from_sequences(
    x0: np.ndarray, mask: np.ndarray, vector: np.ndarray | None = None
) -> SequenceSource:
    """Makes a source of sequences, padded at the end to one length.

    Args:
      x0: floats in [-1, 1], `(N, L, C)`; converted to float32.
      mask: bool `(N, L)`, where a sequence has data: from its first entry, at least one, to its
        end.
      vector: floats `(N, D)`, what a network is told of a sequence besides, or None.

    Returns:
      The source. A batch of it holds `x0` `(B, L, C)`, `mask` `(B, L, 1)` for the loss, and `cond`,
      `{"mask": (B, L)}` and, if there is one, `"vector": (B, D)`, for the network.

    Raises:
      ValueError: shapes or types do not fit, there are no sequences, one has no data, or values are
        out of range.

    Example:
      >>> mask = np.array([[True, True, False], [True, False, False]])
      >>> source = from_sequences(np.zeros((2, 3, 5)), mask)
      >>> batch = source.gather([1, 0, 1])
      >>> batch["x0"].shape, batch["mask"].shape, batch["cond"]["mask"].shape
      ((3, 3, 5), (3, 3, 1), (3, 3))
    """
    x0, mask = np.asarray(x0, np.float32), np.asarray(mask)
    if x0.ndim != 3 or 0 in x0.shape:
        raise ValueError(f"x0 must be (N, L, C) and not empty, got shape {x0.shape}")
    if mask.dtype != bool or mask.shape != x0.shape[:2]:
        raise ValueError(
            f"mask must be bool of shape {x0.shape[:2]}, got {mask.dtype} of shape {mask.shape}"
        )
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("mask must be True up to a sequence's end and False behind it")
    if not mask.any(1).all():
        raise ValueError(f"sequence {int(np.argmin(mask.any(1)))} has no data: leave it out")
    real = x0[mask]
    if not (np.abs(real) <= 1).all():  # also of NaN
        raise ValueError(
            f"x0 must lie in [-1, 1], got values from {real.min()} to {real.max()}: scale it, a "
            "table by data.tables.fit_codec"
        )
    cond = {"mask": mask}
    if vector is not None:
        vector = np.asarray(vector, np.float32)
        if vector.ndim != 2 or len(vector) != len(x0):
            raise ValueError(f"vector must be ({len(x0)}, D), got shape {vector.shape}")
        cond["vector"] = vector
    return SequenceSource({"x0": x0, "mask": mask[..., None], "cond": cond})


def in_memory(
    source: Source, *, max_bytes: int = MAX_BYTES, num_threads: int | None = None
) -> ArraySource | SequenceSource:
    """Reads a whole source into arrays, so that nothing is decoded twice.

    Args:
      source: the source; its images must have one shape.
      max_bytes: how large the images may be together.
      num_threads: how many threads read; None for as many as there are processors, at most 4.

    Returns:
      The same examples as a source in memory.

    Raises:
      ValueError: the source is empty, or larger than `max_bytes`, or its images differ in shape.
    """
    if isinstance(source, (ArraySource, SequenceSource)):
        return source
    if not len(source):
        raise ValueError("the source is empty")
    first = gather(source, [0])
    needed = len(source) * first["image"].nbytes
    if needed > max_bytes:
        raise ValueError(
            f"{len(source)} images of shape {first['image'].shape[1:]} need {needed} bytes, more "
            f"than max_bytes={max_bytes}: give the source to the pipeline as it is, which reads "
            "from it as it goes, or raise max_bytes"
        )
    arrays = {
        key: np.empty((len(source), *value.shape[1:]), value.dtype) for key, value in first.items()
    }
    chunks = [range(i, min(i + 256, len(source))) for i in range(0, len(source), 256)]

    def read(chunk: range) -> int:
        for key, value in gather(source, chunk).items():
            if value.shape[1:] != arrays[key].shape[1:]:
                raise ValueError(
                    f"all images must have one shape, but image 0 has {arrays[key].shape[1:]} and "
                    f"image {chunk[0]} has {value.shape[1:]}"
                )
            arrays[key][chunk[0] : chunk[-1] + 1] = value
        return len(chunk)

    workers = num_threads or min(4, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, _progress(len(source)) as advance:
        for count in pool.map(read, chunks):
            advance(count)
    return ArraySource(arrays["image"], arrays.get("label"))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], Any]]:
    """Yields a function that is told of progress: a bar, if there is tqdm and a terminal."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        yield lambda count: None
        return
    with require("tqdm").tqdm(total=total, desc="reading", unit=" images", leave=False) as bar:
        yield bar.update
