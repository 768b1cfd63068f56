"""A learned schedule: a monotone network for the log-SNR (VDM, Kingma et al. 2021, appendix H).

The paper's network is a line plus a layer of sigmoids, all weights positive, rescaled so that its
ends are parameters of their own:

    u(t) = t + sum_k h_k (sigmoid(r_k (t - c_k)) - sigmoid(-r_k c_k)),   h_k, r_k > 0      (1)
    l(t) = l_max - span u(t) / u(1),   span > 0                                            (2)

Positive numbers are softplus of free parameters, so that the log-SNR decreases strictly whatever
the parameters. (The paper's first layer, a t + b, is absorbed here in h, r and c.)

The parameters are trained along with the network's, in one loss: with
`params = {"network": ..., "schedule": init_learned(key)}`, a loss whose schedule is
`learned(params["schedule"])`, made inside the loss, sends its gradient there.

Example:
  >>> schedule = learned(init_learned(jax.random.key(0), width=16))
  >>> print(f"{schedule.log_snr(0.0):.2f} {schedule.log_snr(1.0):.2f}")
  13.30 -5.00
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.base import Array
from jaxdiff.schedules.continuous import ContinuousSchedule, variance_preserving


class Learned(NamedTuple):
    """The parameters of a learned schedule, eqs. (1)-(2), all float32 and free.

    Attributes:
      log_snr_max: `()`, l_max, the log-SNR at t = 0.
      span: `()`, softplus of which is the fall of the log-SNR from t = 0 to t = 1.
      height: `(K,)`, softplus of which is h.
      rate: `(K,)`, softplus of which is r.
      centre: `(K,)`, c.
    """

    log_snr_max: Array
    span: Array
    height: Array
    rate: Array
    centre: Array


def init_learned(
    key: Array, width: int = 1024, log_snr_min: float = -5.0, log_snr_max: float = 13.3
) -> Learned:
    """Returns parameters at which the log-SNR is close to a line between its ends.

    Args:
      key: one typed key.
      width: K, the number of sigmoids.
      log_snr_min: the log-SNR at t = 1 to start from.
      log_snr_max: the log-SNR at t = 0 to start from. (The ends of VDM.)

    Raises:
      ValueError: `width` is not positive, or the ends are not finite or not in order.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise ValueError(
            f"log_snr_min must be less than log_snr_max, both finite, got {log_snr_min} and "
            f"{log_snr_max}"
        )
    # Steep and gentle sigmoids spread evenly over the interval, together as high as the line.
    rate, place = (jax.random.uniform(jax.random.fold_in(key, i), (width,)) for i in range(2))
    return Learned(
        log_snr_max=jnp.asarray(log_snr_max, jnp.float32),
        span=_softplus_inverse(jnp.asarray(log_snr_max - log_snr_min, jnp.float32)),
        height=_softplus_inverse(jnp.full((width,), 1 / width, jnp.float32)),
        rate=_softplus_inverse((3 + 27 * rate).astype(jnp.float32)),
        centre=((jnp.arange(width) + place) / width).astype(jnp.float32),
    )


def learned(params: Learned) -> ContinuousSchedule:
    """Makes the variance-preserving schedule of the parameters, eqs. (1)-(2).

    The gradient of a node or a log-SNR reaches the parameters. `time`, which is found by bisection,
    lets no gradient through.

    Args:
      params: the parameters, see `init_learned`; they may be traced.

    Returns:
      The schedule.
    """

    def climb(params: Learned, t: Array) -> Array:
        rate, height = jax.nn.softplus(params.rate), jax.nn.softplus(params.height)
        # Elementwise in t of any shape, with an axis for the sigmoids while it lasts.
        before = jax.nn.sigmoid(-rate * params.centre)
        sigmoids = jnp.vectorize(
            lambda t: jnp.sum(height * (jax.nn.sigmoid(rate * (t - params.centre)) - before))
        )
        return t + sigmoids(t)

    def curve(params: Learned, t: Array) -> Array:
        share = climb(params, t) / climb(params, jnp.ones((), t.dtype))
        return params.log_snr_max - jax.nn.softplus(params.span) * share

    def inverse(log_snr: Array) -> Array:
        fixed, log_snr = jax.lax.stop_gradient((params, log_snr))

        def halve(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            t, step = state
            further = t + step
            return jnp.where(curve(fixed, further) >= log_snr, further, t), step / 2

        # One more than the digits of t: at the noisy end this rounds to exactly 1.
        digits = jnp.finfo(log_snr.dtype).nmant + 2
        start = (jnp.zeros_like(log_snr), jnp.asarray(0.5, log_snr.dtype))
        return jax.lax.fori_loop(0, digits, halve, start)[0]

    return ContinuousSchedule(
        f"learned(width={params.centre.shape[0]})",
        lambda t: curve(params, t),
        inverse,
        variance_preserving,
    )


def _softplus_inverse(x: Array) -> Array:
    return x + jnp.log(-jnp.expm1(-x))
