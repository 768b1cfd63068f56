"""The forward process and its posteriors.

With the notation of `jaxdiff.base`, one Markov step, the closed form and the SDE of a schedule are

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                               (1)
    q(x_t | x0)      = N(alpha_t x0, sigma_t² I)                                           (2)
    dx = -beta(t)/2 x dt + sqrt(beta(t)) dw                                                (3)

and everything that a Gaussian sampler needs is in two nodes. For s < t, with
r = alpha_t / alpha_s and v = sigma_t² - r² sigma_s²,

    q(x_s | x_t, x0) = N(r sigma_s²/sigma_t² x_t + alpha_s v/sigma_t² x0, v sigma_s²/sigma_t² I)
                                                                                           (4)

(Ho et al. 2020, eqs. 2, 4, 6-7; Song et al. 2021, eq. 11; Kingma et al. 2021, appendix A). With
consecutive indices v is beta_t. A model of the step back has a variance of its own, between that of
eq. (4) and v:

    small = v sigma_s²/sigma_t²,    large = v,    learned = large^f small^(1 - f)          (5)

(Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, eq. 15).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff._checks import check_float, check_same_shape, check_time
from jaxdiff.base import Array, Node
from jaxdiff.schedules import NoiseSchedule, take


def q_step(schedule: NoiseSchedule, x_prev: Array, t: Array | int, eps: Array) -> Array:
    """Takes one Markov step from x_{t-1} to x_t, eq. (1).

    Args:
      schedule: the schedule.
      x_prev: x_{t-1} `(B, *spatial, C)`; clean data for t = 0.
      t: the index of the step, integer, `()` or `(B,)`, in `0 .. T-1`.
      eps: standard normal noise, shape of `x_prev`.

    Returns:
      x_t, shape of `x_prev`.

    Raises:
      TypeError: `x_prev` or `eps` is not floating, or `t` not of an integer type.
      ValueError: shapes differ, or a known `t` is out of range.
    """
    x_prev, eps = check_float("x_prev", x_prev), check_float("eps", eps)
    check_same_shape(x_prev=x_prev, eps=eps)
    check_time(t, x_prev)
    # As a node: one step from its clean side has alpha = sqrt(1 - beta), sigma = sqrt(beta).
    alphas, betas = take(schedule.alphas, t), take(schedule.betas, t)
    step = Node(jnp.asarray(t), jnp.sqrt(alphas), jnp.sqrt(betas)).over(x_prev)
    return step.alpha * x_prev + step.sigma * eps


def q_sample(schedule: NoiseSchedule, x0: Array, t: Array | int, eps: Array) -> Array:
    """Noises clean data to index t in closed form: x_t = alpha_t x0 + sigma_t eps, eq. (2).

    Args:
      schedule: the schedule.
      x0: clean data `(B, *spatial, C)`, floating, scaled to [-1, 1].
      t: integer, `()` or `(B,)`, in `0 .. T-1`.
      eps: standard normal noise, shape of `x0`.

    Returns:
      x_t, shape of `x0`.

    Raises:
      TypeError: `x0` or `eps` is not floating, or `t` not of an integer type.
      ValueError: shapes differ, or a known `t` is out of range.

    Example:
      >>> from jaxdiff import schedules
      >>> x0, eps = jnp.ones((2, 8, 8, 1)), jnp.zeros((2, 8, 8, 1))
      >>> q_sample(schedules.linear(), x0, jnp.array([0, 999]), eps)[:, 0, 0, 0]
      Array([0.99995   , 0.00635...], dtype=float32)
    """
    x0, eps = check_float("x0", x0), check_float("eps", eps)
    check_same_shape(x0=x0, eps=eps)
    check_time(t, x0)
    return diffuse(x0, eps, schedule.at(t))


def diffuse(x0: Array, eps: Array, node: Node) -> Array:
    """Returns alpha x0 + sigma eps, eq. (2), at any node with scalar or `(B,)` fields."""
    node = node.over(x0)
    return node.alpha * x0 + node.sigma * eps


def sample_xt(
    key: Array, schedule: NoiseSchedule, x0: Array, index: Array | None = None
) -> tuple[Array, Array, Array]:
    """Draws a uniform time and noise for each example, and noises it: what training needs.

    Args:
      key: one typed key.
      schedule: the schedule.
      x0: clean data `(B, *spatial, C)`.
      index: int32 `(B,)`, the numbers of the examples in the global batch; 0 .. B-1 if not given.
        An example's draw depends on `key` and its number alone.

    Returns:
      `(x_t, eps, t)`: noisy data and noise, shape of `x0`, and the times, int32 `(B,)`.

    Raises:
      TypeError: `x0` is not floating, or `key` not a typed key.
    """
    x0 = check_float("x0", x0)
    keys = rng.per_example(key, jnp.arange(x0.shape[0]) if index is None else index)
    t = uniform_index(rng.uniform(rng.stream(keys, rng.Stream.TIME)), schedule.num_steps)
    eps = rng.normal(rng.stream(keys, rng.Stream.NOISE), x0.shape[1:], x0.dtype)
    return q_sample(schedule, x0, t, eps), eps, t


def uniform_index(u: Array, num_steps: int) -> Array:
    """Maps u in [0, 1) to an index in `0 .. num_steps-1`, int32."""
    # float32 rounds u * T up to T for u next to 1.
    return jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)


def q_posterior(x0: Array, x_t: Array, now: Node, next: Node) -> tuple[Array, Array]:
    """Returns mean and variance of q(x_s | x_t, x0), eq. (4), for any s < t.

    Args:
      x0: clean data `(B, ...)`.
      x_t: noisy data at `now`, shape of `x0`.
      now: the noisier node, t; scalar or `(B,)` fields, sigma > 0.
      next: the cleaner node, s.

    Returns:
      The mean, shape of `x0`, and the variance, which broadcasts against it. At a clean `next` the
      mean is x0 and the variance 0.

    Raises:
      ValueError: shapes differ.
    """
    check_same_shape(x0=x0, x_t=x_t)
    now, next = now.over(x0), next.over(x0)
    ratio = now.alpha / next.alpha
    step = step_variance(now, next) / now.sigma**2
    kept = (next.sigma / now.sigma) ** 2
    return ratio * kept * x_t + next.alpha * step * x0, step * next.sigma**2


def step_variance(now: Node, next: Node) -> Array:
    """Returns v = sigma_t² - (alpha_t/alpha_s)² sigma_s², the noise between s = next and t = now.

    For consecutive indices it is beta_t. Shape of the nodes' fields; never negative.
    """
    ratio = now.alpha / next.alpha
    spread = ratio * next.sigma
    return jnp.maximum((now.sigma - spread) * (now.sigma + spread), 0)


Variance = Literal["small", "large", "learned"]
"""Which variance of eq. (5) the step back has."""


def reverse_variance(
    variance: Variance,
    now: Node,
    next: Node,
    fraction: Array | None = None,
    *,
    least: Array | float = 0.0,
) -> Array:
    """Returns the variance of a step back from `now` to `next`, eq. (5), for any s < t.

    Args:
      variance: "small", "large" or "learned".
      now: the noisier node, t, sigma > 0.
      next: the cleaner node, s.
      fraction: f, the share of the large variance in the logarithm, in [0, 1]: a prediction's
        `variance`. "learned" needs it, and nodes that broadcast against it (`Node.over`).
      least: what takes the place of the small variance at a clean `next`, where eq. (4) has none;
        a decoder needs one. The large one is v there, too.

    Returns:
      The variance, shape of the nodes' fields or of `fraction`.

    Raises:
      ValueError: `variance` is none of the three, or there is no `fraction` for "learned".
    """
    check_variance(variance)
    large = step_variance(now, next)
    if variance == "large":
        return large
    kept = jnp.where(next.sigma > 0, (next.sigma / now.sigma) ** 2, least / now.sigma**2)
    if variance == "small":
        return large * kept
    if fraction is None:
        raise ValueError(
            'variance "learned" needs a denoiser that predicts one, got a prediction without: '
            "make it with denoisers.from_network(..., learned_variance=True)"
        )
    # The ratio of the small to the large variance, to the power 1 - f.
    log_kept = jnp.log(jnp.where(kept > 0, kept, 1))
    return jnp.where(kept > 0, large * jnp.exp((1 - fraction) * log_kept), 0)


def check_variance(variance: str) -> None:
    """Checks the name of a variance.

    Raises:
      ValueError: it is none of eq. (5).
    """
    if variance not in get_args(Variance):
        raise ValueError(f'variance must be "small", "large" or "learned", got {variance!r}')


def forward_chain(key: Array, schedule: NoiseSchedule, x0: Array, *, every: int = 1) -> Array:
    """Runs the whole forward chain, eq. (1), fresh noise in each step, in one scan.

    Args:
      key: one typed key; example i's noise depends on it, i and the step alone.
      schedule: the schedule, T steps.
      x0: clean data `(B, *spatial, C)`.
      every: keep each `every`-th state; memory is for those kept only.

    Returns:
      The states, `(1 + ceil(T / every), B, *spatial, C)`: clean data first, x_{T-1} last, and
      between them the states after `every`, `2 * every`, ... steps.

    Raises:
      TypeError: `x0` is not floating, or `key` not a typed key.
      ValueError: `every` is less than 1.
    """
    x0 = check_float("x0", x0)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    keys = rng.per_example(key, jnp.arange(x0.shape[0]))

    def step(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], None]:
        x, kept = carry
        eps = rng.normal(rng.stream(keys, rng.Stream.FORWARD, t), x.shape[1:], x.dtype)
        x = q_step(schedule, x, t, eps)
        # Later steps of a window overwrite the earlier ones.
        return (x, kept.at[t // every].set(x)), None

    num_kept = -(-schedule.num_steps // every)
    kept = jnp.zeros((num_kept, *x0.shape), x0.dtype)
    (_, kept), _ = jax.lax.scan(step, (x0, kept), jnp.arange(schedule.num_steps))
    return jnp.concatenate([x0[None], kept])


def sde(schedule: NoiseSchedule, x: Array, t: Array | int) -> tuple[Array, Array]:
    """Returns drift and diffusion of the schedule's SDE, eq. (3), over the time interval [0, 1].

    beta(t) is constant over each of the T steps, at -T log(1 - beta_t): the only choice under
    which the SDE passes through the discrete chain's marginals exactly. (Song et al. 2021, appendix
    B, have its first order, T beta_t.)

    Args:
      schedule: the schedule, T steps; index t covers the times from t/T to (t+1)/T.
      x: the state `(B, *spatial, C)`.
      t: integer, `()` or `(B,)`, in `0 .. T-1`.

    Returns:
      The drift, shape of `x`, and the diffusion coefficient, which broadcasts against it; both per
      unit of the time in [0, 1].

    Raises:
      TypeError: `x` is not floating, or `t` not of an integer type.
      ValueError: a known `t` is out of range, or has a shape that does not fit.
    """
    x = check_float("x", x)
    check_time(t, x)
    rate = -schedule.num_steps * jnp.log1p(-take(schedule.betas, t))
    rate = rate if rate.ndim == 0 else rate.reshape(rate.shape + (1,) * (x.ndim - 1))
    return -0.5 * rate * x, jnp.sqrt(rate)
