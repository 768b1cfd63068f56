"""What all of `jaxdiff.viz` leans on: images that are checked, and files that are written whole."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]


def check_image(image: Any) -> np.ndarray:
    """Returns a uint8 image as `(H, W, C)`."""
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(
            f"an image must be uint8, got {image.dtype}: to_uint8 makes it from [-1, 1]"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or not image.size:
        raise ValueError(f"an image must be (H, W) or (H, W, C), C 1 or 3; got {image.shape}")
    return image


def check_frames(frames: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    """Returns uint8 images of one shape, each as `(H, W, C)`."""
    images = [check_image(frame) for frame in frames]
    if not images:
        raise ValueError("frames must not be empty")
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(f"frames must be of one shape, got {sorted(shapes)}")
    return images


def check_milliseconds(name: str, value: int) -> None:
    """Raises ValueError for a duration that browsers would not keep to."""
    # They take anything shorter than 20 ms for a mistake and show 100 ms.
    if not 20 <= value <= 60_000:
        raise ValueError(f"{name} must be 20 .. 60000, got {value}")


def pillow_image(image: np.ndarray) -> Any:
    """Returns a checked image as one of Pillow's."""
    return load("PIL.Image").fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png_bytes(image: np.ndarray) -> bytes:
    """Returns a checked image as a PNG file."""
    buffer = io.BytesIO()
    pillow_image(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def load(name: str) -> Any:
    """Imports a module of Pillow or matplotlib when it is needed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"PIL": "Pillow"}.get(name.partition(".")[0], name.partition(".")[0])
        raise ImportError(
            f'jaxdiff.viz needs {package} for this: pip install "jaxdiff[plots]"'
        ) from error


def write(path: PathLike, data: bytes) -> pathlib.Path:
    """Writes a file so that at every instant there is either the old one or the whole new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name without the content
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    return path
