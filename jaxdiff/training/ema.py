"""Exponential moving averages of parameters."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, PyTree

Decay = float | Callable[[Array], Array]
"""The decay: a constant in [0, 1), or a function of the number of updates before this one."""


def warmup(decay: float = 0.9999) -> Callable[[Array], Array]:
    """A decay that starts low: min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...

    So the average is of some use long before 1 / (1 - decay) updates, and forgets the initial
    parameters (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
      decay: the final decay, in [0, 1).

    Raises:
      ValueError: `decay` lies outside [0, 1).

    Example:
      >>> [round(float(warmup(0.999)(n)), 3) for n in (0, 10, 10_000)]
      [0.1, 0.55, 0.999]
    """
    check_decay(decay)
    return lambda count: jnp.minimum(decay, (1 + count) / (10 + count)).astype(jnp.float32)


def update(average: PyTree, params: PyTree, decay: Array | float) -> PyTree:
    """Returns decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def check_decay(decay: Decay) -> None:
    """Checks a constant decay.

    Raises:
      ValueError: it lies outside [0, 1).
    """
    if not callable(decay) and not 0 <= decay < 1:
        raise ValueError(f"an EMA's decay must lie in [0, 1), got {decay}")
