"""Features as float64 matrices, checked alike for all scores."""

from __future__ import annotations

import numpy as np


def read(name: str, x: np.ndarray, at_least: int = 2) -> np.ndarray:
    """Returns features as float64 `(N, D)`.

    Raises:
      ValueError: the shape is another, there are too few, or they are not finite.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} must have the shape (N, D), got {x.shape}: flatten images first")
    if len(x) < at_least:
        raise ValueError(f"{name} must have at least {at_least} rows, got {len(x)}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, but has NaN or infinite values")
    return x


def read_pair(
    real: np.ndarray, samples: np.ndarray, at_least: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Returns real features and those of samples, float64 `(N, D)` and `(M, D)`.

    Raises:
      ValueError: as `read`, or their features differ in number.
    """
    real, samples = read("real", real, at_least), read("samples", samples, at_least)
    if real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"real and samples must have features of one size, got {real.shape[1]} and "
            f"{samples.shape[1]}"
        )
    return real, samples
