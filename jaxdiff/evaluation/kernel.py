"""The kernel distance of features: KID, if they are those of Inception (Bińkowski et al. 2018).

The squared maximum mean discrepancy with the kernel of section 4, of D features,

    k(x, y) = (x'y / D + 1)³,                                                              (1)

is estimated without bias (Gretton et al. 2012, eq. 3), so that it may fall below 0:

    M = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_ij k(x_i, y_j).           (2)

As published, the KID is the mean of eq. (2) over random subsets, and the deviation over them is
printed beside it. That is the spread of an estimate from so few examples, not the error of the
mean, which would take how much the subsets overlap. The standard error here is that of eq. (2) of
all examples, from the jackknife that leaves out one example at a time; for such means it is, on
average, not too small (Efron & Stein 1981), and up to sqrt(2) too large where both sets are of one
distribution.

All sums are in float64, over blocks: the result does not depend on memory.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation import _features

_CHUNK_VALUES = 2**23  # kernel values held at a time: 64 MiB


class KernelDistance(NamedTuple):
    """A kernel distance.

    Attributes:
      value: eq. (2) of all examples, at its expectation the squared discrepancy; may be negative.
      error: its standard error, over real examples and samples.
      low: lower end of the confidence interval of `value`, by the normal approximation.
      high: its upper end.
      subset_mean: the mean of eq. (2) over random subsets: the KID as published.
      subset_deviation: the standard deviation over the subsets, as published.
    """

    value: float
    error: float
    low: float
    high: float
    subset_mean: float
    subset_deviation: float


def kernel_distance(
    real: np.ndarray,
    samples: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> KernelDistance:
    """Computes the kernel distance, called KID if the features are Inception's.

    Published values are often multiplied by 1000; these are not. Its time grows with the product
    of the numbers of examples.

    Args:
      real: features of real examples, `(N, D)`, of any unit: published ones are not scaled.
      samples: features of samples, `(M, D)`.
      subsets: how many random subsets are drawn of each, without replacement within one.
      subset_size: how many examples each has; at most N and M, and no more is taken.
      seed: of the subsets.
      confidence: probability that the interval covers, in (0, 1).

    Returns:
      The distance.

    Raises:
      ValueError: the features differ in size, are not finite, or an option is out of range.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(2, 400, 8))
      >>> far = kernel_distance(x[0], x[1] + 1, subset_size=200)
      >>> print(f"{far.value:.1f}", far.low < far.subset_mean < far.high)
      9.0 True
    """
    real, samples = _features.read_pair(real, samples)
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            f"expected at least 1 subset of at least 2 examples, got {subsets} of {subset_size}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    value, error = mmd(real, samples)
    size = min(subset_size, len(real), len(samples))
    rng = np.random.default_rng(seed)
    # Nothing is left to draw where a subset is everything.
    whole = size == len(real) == len(samples)
    drawn = [value] if whole else [_subset(rng, real, samples, size) for _ in range(subsets)]
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    mean, deviation = float(np.mean(drawn)), float(np.std(drawn))
    return KernelDistance(value, error, value - reach, value + reach, mean, deviation)


def mmd(real: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Computes the unbiased squared discrepancy of all examples, eq. (2), and its standard error.

    Args:
      real: features of real examples, `(N, D)`.
      samples: features of samples, `(M, D)`.

    Returns:
      `(value, error)`. The error is NaN if a set has fewer than 3 examples.

    Raises:
      ValueError: the features differ in size, are not finite or of fewer than 2 examples.
    """
    real, samples = _features.read_pair(real, samples)
    n, m = len(real), len(samples)
    own_real, own_samples = _own_sums(real), _own_sums(samples)
    across_real, across_samples = _across_sums(real, samples)
    xx, yy, xy = own_real.sum(), own_samples.sum(), across_real.sum()
    value = xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
    if min(n, m) < 3:
        return float(value), float("nan")

    def variance(n: int, own: np.ndarray, m: int, across: np.ndarray) -> float:
        # Without example i, its row and column of one mean and its row of the other are gone.
        left = (own.sum() - 2 * own) / ((n - 1) * (n - 2)) - 2 * (xy - across) / ((n - 1) * m)
        return (n - 1) / n * ((left - left.mean()) ** 2).sum()

    of_real = variance(n, own_real, m, across_real)
    of_samples = variance(m, own_samples, n, across_samples)
    return float(value), float(np.sqrt(of_real + of_samples))


def _subset(rng: np.random.Generator, real: np.ndarray, samples: np.ndarray, size: int) -> float:
    x, y = (a[rng.choice(len(a), size, replace=False)] for a in (real, samples))
    own = _own_sums(x).sum() + _own_sums(y).sum()
    return own / (size * (size - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    z = x @ y.T / x.shape[1] + 1
    return z * z * z


def _blocks(n: int, m: int) -> list[slice]:
    step = max(1, _CHUNK_VALUES // m)
    return [slice(start, start + step) for start in range(0, n, step)]


def _own_sums(x: np.ndarray) -> np.ndarray:
    """Returns for each example the sum of its kernel with all others, `(N,)`."""
    total = np.concatenate([_kernel(x[rows], x).sum(1) for rows in _blocks(len(x), len(x))])
    return total - ((x * x).sum(1) / x.shape[1] + 1) ** 3


def _across_sums(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel's sums over y for each of x, `(N,)`, and over x for each of y, `(M,)`."""
    rows, columns = [], np.zeros(len(y))
    for block in _blocks(len(x), len(y)):
        values = _kernel(x[block], y)
        rows.append(values.sum(1))
        columns += values.sum(0)
    return np.concatenate(rows), columns
