"""Pictures: from arrays in [-1, 1] to pixels, grids and captions, and on to PNG and GIF."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.viz._files import (
    PathLike,
    check_frames,
    check_image,
    check_milliseconds,
    load,
    pillow_image,
    png_bytes,
    write,
)


def to_uint8(x: Any) -> np.ndarray:
    """Maps images from [-1, 1] to 0 .. 255.

    Args:
      x: float images, `(..., H, W, C)` with C 1 or 3. Values outside [-1, 1] are clipped.

    Returns:
      uint8, the shape of `x`: round((x + 1) * 127.5).

    Raises:
      TypeError: `x` is not of a floating-point type.
      ValueError: the shape is not that of images, or `x` holds NaN.

    Example:
      >>> to_uint8(np.array([-1.0, 0.0, 2.0]).reshape(1, 3, 1)).ravel().tolist()
      [0, 128, 255]
    """
    x = np.asarray(x)
    if x.dtype.kind in "biucOSU":
        raise TypeError(f"x must be float images in [-1, 1], got {x.dtype}")
    if x.ndim < 3 or x.shape[-1] not in (1, 3):
        raise ValueError(f"x must be (..., H, W, C) with C 1 or 3, got shape {x.shape}")
    x = x.astype(np.float32)  # also from bfloat16, in which 256 levels have no room
    if np.isnan(x).any():
        bad = int(np.isnan(x).sum())
        raise ValueError(f"x holds NaN in {bad} of {x.size} places: there is no colour for it")
    return np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def image_grid(
    x: Any,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
    background: int = 255,
) -> np.ndarray:
    """Lays images out in rows, first image at the top left.

    Args:
      x: images `(N, H, W, C)`, C 1 or 3: float in [-1, 1], or uint8 taken as they are.
      columns: how many to a row; by default about as many as there are rows.
      padding: pixels between the images and around them, after enlarging.
      scale: each pixel becomes a square of this many; by default the smallest that makes the
        longer side of an image at least 32 pixels, so that an 8x8 digit can be seen.
      background: grey level of the padding and of empty places, 0 .. 255.

    Returns:
      One uint8 image `(H', W', C)`.

    Raises:
      ValueError: shape, columns, padding or scale is out of range, or `x` holds NaN.
    """
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or not x.size:
        raise ValueError(f"x must be images (N, H, W, C), N > 0, C 1 or 3; got shape {x.shape}")
    images = x if x.dtype == np.uint8 else to_uint8(x)
    number, height, width, channels = images.shape
    if columns is None:
        columns = math.ceil(math.sqrt(number))
    if scale is None:
        scale = math.ceil(32 / max(height, width))
    if columns < 1 or scale < 1 or padding < 0 or not 0 <= background <= 255:
        raise ValueError(
            "columns and scale must be at least 1, padding at least 0 and background 0 .. 255; "
            f"got columns={columns}, scale={scale}, padding={padding}, background={background}"
        )
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    down, across = height * scale + padding, width * scale + padding
    grid = np.full(
        (rows * down + padding, columns * across + padding, channels), background, np.uint8
    )
    for i, image in enumerate(images):
        top, left = padding + i // columns * down, padding + i % columns * across
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def with_caption(image: np.ndarray, text: str, size: int = 14) -> np.ndarray:
    """Writes one line of text on a white strip below an image.

    Args:
      image: uint8 `(H, W)` or `(H, W, C)`, C 1 or 3.
      text: the line; if it is too long its letters get smaller, down to 8 pixels.
      size: height of the letters in pixels.

    Returns:
      uint8 `(H + round(1.7 * size), W, C)`, with the channels of `image`.

    Raises:
      ImportError: Pillow is missing.
    """
    image = check_image(image)
    fonts = load("PIL.ImageFont")
    width, height = image.shape[1], round(1.7 * size)
    while size > 8 and fonts.load_default(size).getlength(text) > width - 8:
        size -= 1
    strip = load("PIL.Image").new("L", (width, height), 255)
    load("PIL.ImageDraw").Draw(strip).text(
        (width / 2, height / 2), text, fill=30, font=fonts.load_default(size), anchor="mm"
    )
    strip = np.repeat(np.asarray(strip)[:, :, None], image.shape[-1], axis=-1)
    return np.concatenate([image, strip])


def save_png(path: PathLike, image: np.ndarray) -> pathlib.Path:
    """Writes an image as PNG, without loss.

    Args:
      path: the file; missing folders are made, an existing file is replaced at once.
      image: uint8 `(H, W)` or `(H, W, C)`, C 1 or 3.

    Returns:
      The path.

    Raises:
      ImportError: Pillow is missing.
      TypeError: the image is not uint8.
      ValueError: the shape is not that of one image.
    """
    return write(path, png_bytes(check_image(image)))


def save_gif(
    path: PathLike,
    frames: Sequence[np.ndarray] | np.ndarray,
    milliseconds: int = 100,
    last_milliseconds: int = 2000,
) -> pathlib.Path:
    """Writes an animation that repeats for ever and rests on its last frame.

    Grey frames are exact. A colour frame gets its own palette: its 256 commonest colours, where
    those make nine tenths of it, as in a plot; else the best 256, and it is dithered. Equal frames
    in a row become one that is shown as long as all of them.

    Args:
      path: the file; missing folders are made, an existing file is replaced at once.
      frames: uint8 images of one shape, `(K, H, W, C)` or a sequence of `(H, W, C)`, C 1 or 3.
      milliseconds: how long a frame is shown; GIF counts in tens.
      last_milliseconds: how long the last one is.

    Returns:
      The path.

    Raises:
      ImportError: Pillow is missing.
      TypeError: the frames are not uint8.
      ValueError: there are none, their shapes differ, or a duration is out of range.
    """
    check_milliseconds("milliseconds", milliseconds)
    check_milliseconds("last_milliseconds", last_milliseconds)
    pictures = [_palette(frame) for frame in check_frames(frames)]
    durations = [milliseconds] * (len(pictures) - 1) + [last_milliseconds]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
    )
    return write(path, buffer.getvalue())


def _palette(image: np.ndarray) -> Any:
    """Returns one of Pillow's images with at most 256 colours."""
    picture = pillow_image(image)
    if picture.mode == "L":
        return picture
    packed = image.astype(np.int32) @ (65536, 256, 1)  # one number a colour: quick to sort
    packed, place, number = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1)
    common = np.argsort(-number, kind="stable")[:256]
    if 10 * number[common].sum() < 9 * place.size or len(colours) > 10_000:
        # A photograph. Pillow dithers only towards a given palette, so give it the frame's own.
        dither = load("PIL.Image").Dither.FLOYDSTEINBERG
        return picture.quantize(palette=picture.quantize(256), dither=dither)
    # A plot: its common colours stay exactly what they are (Pillow's search would turn white to
    # light grey), and each of the rare ones becomes the nearest of them.
    palette = colours[common]
    nearest = np.square(colours[:, None] - palette).sum(-1).argmin(1).astype(np.uint8)
    indices = nearest[place].reshape(image.shape[:2])
    result = load("PIL.Image").fromarray(indices)
    result.putpalette(palette.astype(np.uint8).tobytes())
    return result
