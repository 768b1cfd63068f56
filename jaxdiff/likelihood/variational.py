"""Likelihood: bits per dimension, by the variational bound.

How many bits the data cost, at most, if they are sent through the chain that `solvers.ddpm` walks
on all T steps (Ho et al. 2020, eq. 5; the terms are those of `jaxdiff.losses.variational`):

    bits = (prior + sum_t L_t + decoder) / log 2,    means over the coordinates            (1)

Each term is drawn once, at noise of its own, so that the result is one unbiased draw of the bound;
the mean over examples is what is reported. Data must lie on `num_levels` levels from -1 to 1, as
images of 8 bits do after x / 127.5 - 1.

Example:
  >>> import jax
  >>> from jaxdiff import denoisers, schedules
  >>> exact = denoisers.gaussian(jax.numpy.zeros((4, 4, 1)), 0.25)
  >>> levels = jax.numpy.round(127.5 * exact.sample(jax.random.key(0), 64) + 127.5)
  >>> bits, terms = variational_bound(
  ...     jax.random.key(1), exact.denoiser, schedules.cosine(100), levels / 127.5 - 1)
  >>> bits.shape, terms.steps.shape, f"{bits.mean():.0f}"
  ((64,), (99, 64), '8')
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff._checks import check_float
from jaxdiff.base import Array, Denoiser, Schedule
from jaxdiff.losses._masks import fill_masked
from jaxdiff.losses.variational import (
    bound_term,
    check_num_levels,
    first_variance,
    node_before,
    prior_term,
)
from jaxdiff.process import Variance, check_variance, diffuse


class Terms(NamedTuple):
    """The terms of eq. (1), each in bits per dimension.

    Attributes:
      prior: what noisy data at the last index still differ from noise, `(B,)`.
      steps: L_t for t = 1 .. T-1, `(T-1, B)`: row i is the step from index i + 1 to index i.
      decoder: the last step, from index 0 to clean data, `(B,)`.
    """

    prior: Array
    steps: Array
    decoder: Array


def variational_bound(
    key: Array,
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Array,
    *,
    variance: Variance = "small",
    num_levels: int = 256,
    index: Array | None = None,
    mask: Array | None = None,
) -> tuple[Array, Terms]:
    """Returns a draw of the bound on the bits per dimension, eq. (1).

    It takes T evaluations of the denoiser, in one scan.

    Args:
      key: one typed key.
      denoiser: the denoiser; its predictions should be clipped (`guidance.clip_x0`) if those of the
        sampler are.
      schedule: the discrete schedule, T steps.
      x0: clean data `(B, *spatial, C)`, on their levels.
      variance: of the model's steps, as in `solvers.ddpm`: "small", "large", or "learned" for a
        denoiser that predicts one. At the decoder the small one, which is 0 there, is that of the
        step before (`losses.first_variance`).
      num_levels: the number of the data's levels.
      index: int32 `(B,)`, the examples' numbers in the data set, 0 .. B-1 if not given. What is
        drawn for an example depends on `key` and its number alone.
      mask: 1 where a coordinate counts, broadcasts to `x0`; None for all.

    Returns:
      The bits per dimension `(B,)`, over the coordinates that count, and the terms.

    Raises:
      TypeError: `x0` is not floating, or `key` not a typed key.
      ValueError: the schedule is continuous; `variance` is none of the three, or the denoiser
        predicts none where it is learned; there are fewer than two levels; the mask does not fit.
    """
    if schedule.num_steps is None:
        raise ValueError(
            "variational_bound needs a discrete schedule, got a continuous one: the bound is that "
            "of a chain of T steps"
        )
    check_variance(variance)
    check_num_levels(num_levels)
    x0 = fill_masked(check_float("x0", x0), mask)
    keys = rng.per_example(key, jnp.arange(x0.shape[0]) if index is None else index)
    least = first_variance(schedule)

    def term(_: None, t: Array) -> tuple[None, Array]:
        now, next = schedule.at(t), node_before(schedule, t)
        eps = rng.normal(rng.stream(keys, rng.Stream.FORWARD, t), x0.shape[1:], x0.dtype)
        x = diffuse(x0, eps, now)
        return None, bound_term(
            x0, x, denoiser(x, now), now, next, variance,
            least=least, num_levels=num_levels, mask=mask,
        )  # fmt: skip

    _, steps = jax.lax.scan(term, None, jnp.arange(schedule.num_steps))
    prior = prior_term(x0, schedule.at(schedule.num_steps - 1), mask=mask)
    prior, steps = (nats / math.log(2) for nats in (prior, steps))
    return prior + jnp.sum(steps, axis=0), Terms(prior, steps[1:], steps[0])
