"""Images as the networks of this package take them, checked alike."""

from __future__ import annotations

import numpy as np

_LARGEST = 2.0  # unclipped samples leave [-1, 1] a little; bytes as floats by far


def read(images: np.ndarray, min_size: int = 1) -> np.ndarray:
    """Returns images `(N, H, W, C)`, uint8 as they are, floating ones as float32.

    Raises:
      ValueError: the shape, the type or the range is another.
    """
    images = np.asarray(images)
    if images.ndim != 4 or min(images.shape[1:3]) < min_size:
        size = f" with H and W at least {min_size}" if min_size > 1 else ""
        raise ValueError(f"images must have the shape (N, H, W, C){size}, got {images.shape}")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"images must be uint8 in 0 .. 255 or floating in [-1, 1], got {images.dtype}"
        )
    images = images.astype(np.float32)
    largest = np.abs(images).max(initial=0)
    if not largest <= _LARGEST:  # nor NaN
        raise ValueError(f"floating images must be in [-1, 1], got values as large as {largest:g}")
    return images
