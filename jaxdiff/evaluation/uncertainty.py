"""Standard errors of scores that are no means over examples.

Jackknife (Quenouille 1956; for groups of unequal size Busing, Meijer & van der Leeden 1999), for
scores that change smoothly with the data, such as distances. Of n examples in g groups of m_j,
with s the score of all, s_j that without group j and h_j = n/m_j,

    corrected  c = g s - sum_j (1 - m_j/n) s_j                                             (1)
    bias       s - c                                                                       (2)
    error²     1/g sum_j (h_j s - (h_j - 1) s_j - c)² / (h_j - 1)                          (3)

Real examples and samples are independent: each is left out by itself, biases and squared errors
add. With g groups the error itself is known to one part in sqrt(2(g - 1)). The bias is exact if it
falls like 1/n.

Half samples (Politis & Romano 1994, with n/2 of n), for scores that do not, such as precision and
recall, which count neighbours: among the halves of n examples, drawn without replacement, a score
varies as much as among sets of n from the whole distribution, because their variance is
(1/m - 1/n) of one example's for m of n.

There is no bootstrap. Drawn with replacement, examples have copies at distance 0, and neighbours,
covariances and kernel means are those of other data: a coverage of 0.91 had a bootstrap mean of
0.75. On two Gaussians in 2 and 8 dimensions, 300 examples each, half samples' errors of precision,
recall, density and coverage were 1.0 to 1.4 times the true ones, except for a precision of 0.998,
and the jackknife's 1.3 to 1.7 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Estimate(NamedTuple):
    """A score and how far to trust it; where a score has parts, so has each field.

    Attributes:
      value: the score of all examples.
      error: its standard error.
      bias: how much too high it is, as far as the jackknife sees; `value - bias` is corrected.
        None from `half_samples`, which do not tell.
    """

    value: Any
    error: Any
    bias: Any = None


def jackknife(
    statistic: Callable[[np.ndarray, np.ndarray], Any],
    real: np.ndarray,
    samples: np.ndarray,
    *,
    groups: int = 10,
    fixed_real: bool = False,
) -> Estimate:
    """Computes a score with its standard error and bias, eqs. (1) to (3).

    Example i is in group i modulo `groups`: data sorted by class are spread over all.

    Args:
      statistic: the score, `(real, samples) -> float`, or a tree of floats such as `Manifold`.
      real: features of real examples, `(N, ...)`.
      samples: features of samples, `(M, ...)`.
      groups: how many, at least 2; the score is computed about twice as often.
      fixed_real: whether the real examples are all there are, not drawn from others; only the
        samples then vary, as in published comparisons with one reference set.

    Returns:
      The estimate; its fields have the structure of the score.

    Raises:
      ValueError: there are fewer examples than groups, or fewer than 2 groups.

    Example:
      >>> x = np.arange(20.0)
      >>> gap = jackknife(lambda real, samples: samples.mean() - real.mean(), x, x + 1, groups=20)
      >>> print(f"{gap.value:.2f} +- {gap.error:.2f}")  # sqrt(2 var / 20)
      1.00 +- 1.87
    """
    if groups < 2:
        raise ValueError(f"groups must be at least 2, got {groups}")
    for name, x in (("real", real), ("samples", samples)):
        if len(x) < groups:
            raise ValueError(f"{name} must have an example for each of {groups} groups: {len(x)}")
    value, structure = jax.tree.flatten(statistic(real, samples))
    value = np.asarray(value, np.float64)

    def left_out(part: int) -> list[np.ndarray]:
        x = (real, samples)[part]
        kept = (np.arange(len(x)) % groups != group for group in range(groups))
        pairs = ((x[k], samples) if part == 0 else (real, x[k]) for k in kept)
        return [np.asarray(jax.tree.leaves(statistic(*pair)), np.float64) for pair in pairs]

    sides = [
        (left_out(part), [len(range(group, len(x), groups)) for group in range(groups)])
        for part, x in enumerate((real, samples))
        if not (part == 0 and fixed_real)
    ]
    error, bias = combine(value, sides)
    return Estimate(
        *(jax.tree.unflatten(structure, part.tolist()) for part in (value, error, bias))
    )


def half_samples(
    statistic: Callable[[np.ndarray, np.ndarray], Any],
    real: np.ndarray,
    samples: np.ndarray,
    *,
    num: int = 20,
    seed: int = 0,
    fixed_real: bool = False,
) -> Estimate:
    """Computes a score with its standard error: the standard deviation over random halves.

    Args:
      statistic: the score, `(real, samples) -> float`, or a tree of floats such as `Manifold`.
      real: features of real examples, `(N, ...)`.
      samples: features of samples, `(M, ...)`.
      num: how many times halves of both are drawn, at least 2.
      seed: of the halves.
      fixed_real: whether the real examples are all there are; they are then not halved.

    Returns:
      The estimate, of no bias; its fields have the structure of the score.

    Raises:
      ValueError: there are fewer than 2 examples, or num is below 2.

    Example:
      >>> x = np.arange(20.0)
      >>> gap = half_samples(lambda real, samples: samples.mean() - real.mean(), x, x, num=2000)
      >>> print(f"{gap.value:.1f} +- {gap.error:.1f}")  # sqrt(2 var / 20)
      0.0 +- 1.9
    """
    if num < 2 or min(len(real), len(samples)) < 2:
        raise ValueError(
            f"expected num of at least 2 and at least 2 examples, got {num} of {len(real)} and "
            f"{len(samples)}"
        )
    rng = np.random.default_rng(seed)

    def half(x: np.ndarray) -> np.ndarray:
        return x[np.sort(rng.permutation(len(x))[: len(x) // 2])]

    value, structure = jax.tree.flatten(statistic(real, samples))
    scores = [
        jax.tree.leaves(statistic(real if fixed_real else half(real), half(samples)))
        for _ in range(num)
    ]
    error = np.std(np.asarray(scores, np.float64), axis=0, ddof=1)
    return Estimate(*(jax.tree.unflatten(structure, part) for part in (value, error.tolist())))


def combine(
    value: np.ndarray, sides: Sequence[tuple[Sequence[np.ndarray], Sequence[int]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes standard errors and biases from scores without a group each, eqs. (1) to (3).

    Args:
      value: the scores of all examples, float64 `(...)`.
      sides: for each independent set of examples its scores without each group, `(g, ...)`, and
        the sizes of the groups, `(g,)`.

    Returns:
      `(error, bias)`, each `(...)`.
    """
    value = np.asarray(value, np.float64)
    variance, bias = np.zeros_like(value), np.zeros_like(value)
    for scores, sizes in sides:
        left = np.asarray(scores, np.float64)
        share = np.asarray(sizes, np.float64) / np.sum(sizes)
        share = share.reshape(-1, *(1,) * value.ndim)
        corrected = len(left) * value - ((1 - share) * left).sum(0)
        single = (value - (1 - share) * left) / share - corrected
        variance += (single**2 / (1 / share - 1)).mean(0)
        bias += value - corrected
    return np.sqrt(variance), bias
