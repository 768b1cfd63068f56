"""The Inception Score (Salimans et al. 2016, section 4), of any classifier's probabilities.

With p_i the probabilities that a classifier gives sample i, and q their mean over the samples,

    IS = exp( mean_i KL(p_i || q) ) = exp( H(q) - mean_i H(p_i) ),                         (1)

between 1 and the number of classes. It is the Inception Score only with Inception-V3 and its 1008
outputs; by another classifier say which. It sees no real data: a model that repeats one good image
of each class scores highest. Fewer samples score lower.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation import _features

_CHUNK_VALUES = 2**23  # probabilities looked at a time: 64 MiB


class InceptionScore(NamedTuple):
    """An Inception Score.

    Attributes:
      mean: of eq. (1) over the splits: the score as published.
      deviation: the standard deviation over the splits, as published.
      value: eq. (1) of all samples at once, a little higher than `mean`.
      error: the standard error of `value`, from leaving out one sample at a time.
    """

    mean: float
    deviation: float
    value: float
    error: float


def inception_score(probabilities: np.ndarray, *, splits: int = 10) -> InceptionScore:
    """Computes the Inception Score.

    Args:
      probabilities: of the classes of each sample, `(N, K)`, in [0, 1], each row of sum 1. Samples
        are in random order: a split is a run of consecutive ones, as published.
      splits: in how many parts of nearly equal size the samples are cut; 10 in print, of 50,000.

    Returns:
      The score.

    Raises:
      ValueError: a row is no distribution, or there are fewer samples than 2 or than splits.

    Example:
      >>> inception_score(np.tile(np.eye(4), (25, 1)), splits=5).mean  # sure, and of all classes
      4.0
    """
    p = _features.read("probabilities", probabilities)
    if p.min() < 0 or not np.allclose(p.sum(1), 1, rtol=0, atol=1e-3):
        raise ValueError(
            "probabilities must be at least 0 and of sum 1 in each row: apply softmax to logits"
        )
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits must be in 1 .. {len(p)}, the number of samples, got {splits}")
    p = p / p.sum(1, keepdims=True)
    certain = _plogp(p)  # minus each sample's entropy
    edges = [i * len(p) // splits for i in range(splits + 1)]
    parts = [slice(*ends) for ends in itertools.pairwise(edges)]
    scores = [_score(p[part].mean(0), certain[part].mean()) for part in parts]
    # Without sample i, the mean probabilities and the mean entropy are known from the sums.
    rest, n = len(p) - 1, len(p)
    step = max(1, _CHUNK_VALUES // p.shape[1])
    without = [
        np.exp((certain.sum() - certain[start : start + step]) / rest - _plogp(q))
        for start in range(0, n, step)
        for q in [np.maximum(p.sum(0) - p[start : start + step], 0) / rest]
    ]
    left = np.concatenate(without)
    error = np.sqrt(rest / n * ((left - left.mean()) ** 2).sum())
    value = _score(p.mean(0), certain.mean())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), value, float(error))


def _plogp(p: np.ndarray) -> np.ndarray:
    """Returns the sums of p log p over the last axis, 0 log 0 being 0."""
    return (p * np.log(np.where(p > 0, p, 1))).sum(-1)


def _score(q: np.ndarray, certain: float) -> float:
    return float(np.exp(certain - _plogp(q)))
