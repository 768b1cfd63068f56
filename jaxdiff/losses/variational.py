"""The terms of the variational bound on -log p(x0).

A chain of reverse steps p(x_s | x_t), Gaussian, with the mean of q(x_s | x_t, x0) at the predicted
x0 and a variance of its own (`jaxdiff.process`, eqs. 4, 5), bounds the likelihood (Ho et al. 2020,
eq. 5) by

    -log p(x0) <= KL(q(x_T | x0) || N(0, I))                                 prior         (1)
                + sum_t KL(q(x_s | x_t, x0) || p(x_s | x_t))                 steps         (2)
                - log p(x0 | x_1)                                            decoder       (3)

each in expectation over x_t ~ q(x_t | x0). The decoder is the last step of the chain, a Gaussian
integrated over the bins of the data's levels, from 1/255 below to 1/255 above for 256 of them; the
outermost bins reach to infinity (Ho et al. 2020, eq. 13).

All is in nats per coordinate: means over the coordinates that count, not sums. Divided by log 2
they are bits per dimension.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from jaxdiff._checks import check_same_shape
from jaxdiff.base import Array, Node, Prediction, Schedule
from jaxdiff.losses._masks import masked_mean
from jaxdiff.process import Variance, reverse_variance, step_variance


def gaussian_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """Returns KL(N(mean1, variance1) || N(mean2, variance2)) for each coordinate, in nats.

    Args:
      mean1: mean of the first.
      log_variance1: logarithm of its variance.
      mean2: mean of the second.
      log_variance2: logarithm of its variance.

    Returns:
      The divergence, of the shape that the four broadcast to.
    """
    log_ratio = log_variance1 - log_variance2
    distance = (mean1 - mean2) ** 2 * jnp.exp(-log_variance2)
    # exp(r) - 1 - r: near r = 0 expm1 keeps the digits of the first two.
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + distance)


def discretized_log_likelihood(
    x0: Array, mean: Array, log_std: Array, num_levels: int = 256
) -> Array:
    """Returns the log-probability of x0's bin under a Gaussian, for each coordinate, eq. (3).

    Ho et al. 2020, eq. 13. The difference of the two cumulative probabilities is taken in the
    logarithm, on the side of the nearer tail, so that it has its digits also far from the mean (to
    1000 standard deviations, beyond which it stays what it is there).

    Args:
      x0: data `(B, ...)` on levels at equal distances from -1 to 1.
      mean: the Gaussian's mean, shape of `x0`.
      log_std: logarithm of its standard deviation, broadcasts against `x0`.
      num_levels: the number of levels, 256 for images of 8 bits.

    Returns:
      In nats, shape of `x0`.

    Raises:
      ValueError: `x0` and `mean` differ in shape, or there are fewer than two levels.
    """
    check_same_shape(x0=x0, mean=mean)
    check_num_levels(num_levels)
    x0, mean = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x0, mean))
    half = 1 / (num_levels - 1)
    scale = jnp.exp(-log_std)
    upper, lower = (x0 - mean + half) * scale, (x0 - mean - half) * scale
    # The bin mirrored to the left of the mean.
    is_left = x0 < mean
    right = jnp.where(is_left, upper, -lower)
    left = right - 2 * half * scale
    shift = jnp.maximum(-1e3 - right, 0)
    right, left = log_ndtr(right + shift), log_ndtr(left + shift)
    inner = right + jnp.log1p(-jnp.exp(left - right))
    tail = log_ndtr(jnp.maximum(jnp.where(x0 < 0, upper, -lower), -1e3))
    return jnp.where(jnp.abs(x0) > 1 - half, tail, inner)


def bound_term(
    x0: Array,
    x_t: Array,
    prediction: Prediction,
    now: Node,
    next: Node,
    variance: Variance,
    *,
    least: Array | float,
    num_levels: int = 256,
    mask: Array | None = None,
) -> Array:
    """Returns the term of one step, eq. (2), or at a clean `next` the decoder's, eq. (3).

    Args:
      x0: clean data `(B, ...)`.
      x_t: noisy data at `now`, shape of `x0`.
      prediction: what the denoiser believes of `x_t`.
      now: the noisier node, t; scalar or `(B,)` fields, sigma > 0.
      next: the cleaner node, s.
      variance: the variance of the model's step, "small", "large" or "learned".
      least: the decoder's "small" variance, positive: `first_variance(schedule)`.
      num_levels: the number of the data's levels.
      mask: 1 where a coordinate counts, broadcasts to `x0`; None for all.

    Returns:
      `(B,)`, the mean over the coordinates that count, in nats.

    Raises:
      ValueError: shapes differ, `variance` is none of the three, the prediction holds no variance
        where it must be learned, or there are fewer than two levels.
    """
    check_same_shape(x0=x0, x_t=x_t)
    now, next = now.over(x0), next.over(x0)
    true = reverse_variance("small", now, next, least=least)
    model = reverse_variance(variance, now, next, prediction.variance, least=least)
    # The difference of the means, in which x_t cancels.
    gain = next.alpha * step_variance(now, next) / now.sigma**2
    error = gain * (x0 - prediction.x0)
    kl = gaussian_kl(error, jnp.log(true), jnp.zeros_like(error), jnp.log(model))
    decoder = -discretized_log_likelihood(x0, prediction.x0, 0.5 * jnp.log(model), num_levels)
    return masked_mean(jnp.where(next.sigma > 0, kl, decoder), mask)


def prior_term(x0: Array, last: Node, *, mask: Array | None = None) -> Array:
    """Returns what noisy data at the schedule's last node still differ from noise, eq. (1).

    Args:
      x0: clean data `(B, ...)`.
      last: the noisiest node, scalar fields.
      mask: 1 where a coordinate counts, broadcasts to `x0`; None for all.

    Returns:
      `(B,)`, the mean over the coordinates that count, in nats.
    """
    zeros = jnp.zeros_like(x0)
    kl = gaussian_kl(last.alpha * x0, 2 * jnp.log(last.sigma), zeros, zeros)
    return masked_mean(kl, mask)


def node_before(schedule: Schedule, t: Array) -> Node:
    """Returns the node that a step back from index t arrives at: t - 1, or clean data for 0."""
    node = schedule.at(jnp.maximum(t - 1, 0))
    is_first = t == 0
    return Node(
        t - 1,
        jnp.where(is_first, jnp.ones_like(node.alpha), node.alpha),
        jnp.where(is_first, jnp.zeros_like(node.sigma), node.sigma),
    )


def first_variance(schedule: Schedule) -> Array:
    """Returns the "small" variance of the decoder: that of the second step.

    The first step's own is 0 (Ho et al. 2020 and Nichol & Dhariwal 2021, in their code). It suits
    chains whose first steps are alike: where the first is much wider than the second, as in
    respaced ones, a decoder so narrow costs many bits. Of one step only it is the "large" one.
    """
    first = schedule.at(0)
    if schedule.num_steps == 1:
        return first.sigma**2
    return reverse_variance("small", schedule.at(1), first)


def check_num_levels(num_levels: int) -> None:
    """Checks a number of levels.

    Raises:
      ValueError: it is less than 2.
    """
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, got {num_levels}: 256 for 8 bits")
