"""The sliced Wasserstein distance of features (Rabin et al. 2012; Bonneel et al. 2015).

Over directions u, uniform on the unit sphere, and with W the Wasserstein distance of order 2 of
numbers on a line, that is the distance of their quantile functions,

    SW² = mean_u W²(u'x, u'y),    W² = integral over q in (0, 1) of (F⁻¹(q) - G⁻¹(q))².    (1)

It is exact for each direction, also for sets of different size. Between Gaussians of covariance I
whose means are d apart, of D features, SW² = |d|²/D. It needs no covariance, but the distance of
finite sets of one distribution is above 0, and falls like 1/sqrt(n).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation import _features

_CHUNK_VALUES = 2**23  # projections held at a time: 64 MiB


class SlicedWasserstein(NamedTuple):
    """A sliced Wasserstein distance.

    Attributes:
      value: SW, the root of eq. (1) with the mean over the directions drawn; in units of features.
      error: its standard error over the directions only: by how much others would change it. What
        other examples would change is told by `uncertainty.jackknife`.
    """

    value: float
    error: float


def sliced_wasserstein(
    real: np.ndarray, samples: np.ndarray, *, projections: int = 500, seed: int = 0
) -> SlicedWasserstein:
    """Computes the sliced Wasserstein distance of order 2.

    Args:
      real: features of real examples, `(N, D)`, of any unit; pixels in [-1, 1] do for small images.
      samples: features of samples, `(M, D)`.
      projections: how many directions are drawn, at least 2. More begin with the same.
      seed: of the directions.

    Returns:
      The distance.

    Raises:
      ValueError: the features differ in size or are not finite, or projections is below 2.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(300, 4))
      >>> print(f"{sliced_wasserstein(x, x + 1).value:.1f}")  # |d| / sqrt(D) = 1
      1.0
    """
    real, samples = _features.read_pair(real, samples, 1)
    if projections < 2:
        raise ValueError(f"projections must be at least 2, got {projections}")
    directions = np.random.default_rng(seed).standard_normal((projections, real.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    step = max(1, _CHUNK_VALUES // max(len(real), len(samples)))
    parts = [directions[start : start + step].T for start in range(0, projections, step)]
    squares = np.concatenate([_squares(real @ part, samples @ part) for part in parts])
    value = np.sqrt(squares.mean())
    error = squares.std(ddof=1) / np.sqrt(projections)  # of SW², whose slope is 2 SW
    return SlicedWasserstein(float(value), float(error / (2 * value)) if value else 0.0)


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns W² of each column of x `(N, L)` and y `(M, L)`, `(L,)`."""
    x, y = np.sort(x, axis=0), np.sort(y, axis=0)
    n, m = len(x), len(y)
    if n == m:
        return ((x - y) ** 2).mean(0)
    # Between consecutive multiples of 1/N and 1/M, counted in 1/(NM), both quantiles are constant.
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    start, width = edges[:-1], np.diff(edges) / (n * m)
    return width @ (x[start // m] - y[start // n]) ** 2
