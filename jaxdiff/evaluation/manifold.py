"""How close samples are to data: precision, recall, density and coverage.

All four look at balls around points of one set that reach to their k-th nearest neighbour in the
same set, and ask how points of the other set fall into them (Kynkäänniemi et al. 2019, section 3;
Naeem et al. 2020, section 3). Any features will do; for small images the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_CHUNK_VALUES = 2**24  # distances held at a time: 128 MiB


class Manifold(NamedTuple):
    """Scores of samples against real data, each a fraction.

    Attributes:
      precision: of the samples, those within some real point's ball. In [0, 1].
      recall: of the real points, those within some sample's ball. In [0, 1].
      density: the mean number of real balls that a sample lies in, over k. May exceed 1.
      coverage: of the real points, those whose ball holds a sample. In [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: np.ndarray, samples: np.ndarray, *, k: int = 5) -> Manifold:
    """Computes precision, recall, density and coverage.

    Args:
      real: features of real data, `(N, ...)`; all axes but the first are flattened.
      samples: features of samples, `(M, ...)`.
      k: which neighbour a ball reaches to, not counting the point itself.

    Returns:
      The scores.

    Raises:
      ValueError: the features differ in size, are not finite, or a set has no more than k points.

    Example:
      >>> points = np.random.default_rng(0).normal(size=(2, 500, 2))
      >>> scores = manifold_scores(*points)
      >>> print(f"{scores.precision:.2f} {scores.coverage:.2f}")
      1.00 0.97
    """
    real, samples = _features("real", real, k), _features("samples", samples, k)
    if real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"real and samples must have features of one size, got {real.shape[1]} and "
            f"{samples.shape[1]}"
        )
    real_radii, sample_radii = _radii(real, k), _radii(samples, k)
    balls = np.zeros(len(samples), np.int64)  # how many real balls each sample lies in
    recalled, covered = 0, 0
    for rows, distances in _distances(real, samples):
        inside = distances < real_radii[rows, None]
        balls += inside.sum(0)
        covered += inside.any(1).sum()
        recalled += (distances < sample_radii).any(1).sum()
    return Manifold(
        precision=float((balls > 0).mean()),
        recall=float(recalled / len(real)),
        density=float(balls.mean() / k),
        coverage=float(covered / len(real)),
    )


def _features(name: str, x: np.ndarray, k: int) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if k < 1 or len(x) <= k:
        raise ValueError(f"{name} must have more points than k >= 1, got {len(x)} with k = {k}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, but has NaN or infinite values")
    return x.reshape(len(x), -1)


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices of a's rows and their Euclidean distances to all rows of b."""
    from scipy.spatial.distance import cdist

    step = max(1, _CHUNK_VALUES // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        yield rows, cdist(a[rows], b)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    # The nearest of all is the point itself, at distance 0.
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for _, d in _distances(x, x)])
