"""The variational bound in continuous time (VDM, Kingma et al. 2021).

In the limit of infinitely many steps the bound is an integral over the log-SNR l,

    -log p(x0) <= KL(q(z_1 | x0) || N(0, I))                                 prior         (1)
                + 1/2 int_{l_1}^{l_0} E |eps - eps_hat(z_l, l)|² dl          diffusion     (2)
                - E log p(x0 | z_0)                                          reconstruction (3)

between the schedule's ends (their eqs. 11, 17, 18; eps - eps_hat = alpha/sigma (x0_hat - x0)). The
way that the schedule takes between its ends does not matter to eq. (2), only to how well it is
estimated. The decoder knows nothing but z_0 and the levels v of the data (their section 3.3),

    p(x0 | z_0) = exp(-SNR_0 (x0 - z_0/alpha_0)² / 2) / sum_v exp(-SNR_0 (v - z_0/alpha_0)² / 2) (4)

for each coordinate. The prior is N(0, I) in the frame that preserves the variance,
z = x / sqrt(alpha² + sigma²); eqs. (2) and (4) are the same in any.

Eq. (2) is estimated at N points of [0, 1), times t or shares of the log-SNR's range:

    "time":    t = u,                     1/2 (-dl/dt) |eps - eps_hat|²                    (5)
    "log_snr": l = l_0 + u (l_1 - l_0),   1/2 (l_0 - l_1) |eps - eps_hat|²                 (6)

Eq. (6) is eq. (5) with times of density proportional to -dl/dt = g²/sigma²: the importance sampling
of Song et al. 2021b ("Maximum likelihood training", section 4.2) for their likelihood weighting.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff._checks import check_float, is_concrete
from jaxdiff.base import Array, Denoiser, Node, Schedule
from jaxdiff.losses._masks import fill_masked, masked_mean
from jaxdiff.losses.variational import check_num_levels, prior_term
from jaxdiff.process import diffuse
from jaxdiff.schedules import variance_preserving

Sampling = Literal["log_snr", "time"]
"""What the points are spread over, eq. (5) or (6)."""

Points = Literal["low_discrepancy", "grid"]
"""How the points lie in [0, 1)."""


class ContinuousTerms(NamedTuple):
    """The terms of eqs. (1)-(3), in bits per dimension.

    Attributes:
      prior: what noisy data at the end still differ from noise, `(B,)`.
      diffusion: eq. (2), the mean over the points, `(B,)`.
      reconstruction: eq. (3), `(B,)`.
      error: the standard error of `diffusion`, from the differences of neighbouring points, which
        leave out what all draws have in common, `(B,)`; NaN for one point.
      points: what each point says of eq. (2), `(N, B)`.
      log_snr: where the points lie, `(N, B)`.
    """

    prior: Array
    diffusion: Array
    reconstruction: Array
    error: Array
    points: Array
    log_snr: Array


def continuous_bound(
    key: Array,
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Array,
    *,
    num_points: int = 128,
    points: Points = "low_discrepancy",
    sampling: Sampling = "log_snr",
    log_snr_min: float = -15.0,
    log_snr_max: float = 13.3,
    num_levels: int = 256,
    index: Array | None = None,
    mask: Array | None = None,
) -> tuple[Array, ContinuousTerms]:
    """Returns a draw of the bound on the bits per dimension, the sum of eqs. (1)-(3).

    It takes `num_points` evaluations of the denoiser, in one scan.

    Args:
      key: one typed key.
      denoiser: the denoiser.
      schedule: the schedule, fixed or `schedules.learned`; a discrete one is that of its log-SNRs'
        range, with the process between its indices that `schedule.levels` and `.time` tell.
      x0: clean data `(B, *spatial, C)`, on their levels.
      num_points: N.
      points: "low_discrepancy" (i + U) / N with one U for each example (Kingma et al. 2021,
        appendix I.1): without bias; "grid" (i + 1/2) / N, the same for all: an error of the
        quadrature that falls as 1/N², and less noise between examples.
      sampling: "log_snr" or "time", eq. (6) or (5).
      log_snr_min: where the bound's process ends, unless the schedule does so before.
      log_snr_max: where it starts, unless the schedule does so later; 13.3 as in the paper. Any
        range makes a bound. One that starts at noise narrower than the levels' bins (above 11 for
        256) costs bits if the network does not know that there are levels.
      num_levels: the number of the data's levels.
      index: int32 `(B,)`, the examples' numbers in the data set, 0 .. B-1 if not given. What is
        drawn for an example depends on `key` and its number alone.
      mask: 1 where a coordinate counts, broadcasts to `x0`; None for all.

    Returns:
      The bits per dimension `(B,)`, over the coordinates that count, and the terms.

    Raises:
      TypeError: `x0` is not floating, or `key` not a typed key.
      ValueError: a name is none of those above; "time" is asked for on a discrete schedule; there
        is no point, no range or less than two levels; the mask does not fit.
    """
    _check_options(schedule, num_points, points, sampling, num_levels)
    x0 = fill_masked(check_float("x0", x0), mask)
    keys = rng.per_example(key, jnp.arange(x0.shape[0]) if index is None else index)
    first, last = _ends(schedule, log_snr_min, log_snr_max)
    offset = 0.5
    if points == "low_discrepancy":
        offset = rng.uniform(rng.stream(keys, rng.Stream.TIME))

    def place(number: Array) -> tuple[Array, Array, Array]:
        """Returns t, the log-SNR and twice the weight in eq. (5) or (6) of a point, `(B,)`."""
        u = jnp.broadcast_to((number + offset) / num_points, x0.shape[:1])
        if sampling == "log_snr":
            log_snr = first + u * (last - first)
            return schedule.time(log_snr), log_snr, jnp.broadcast_to(first - last, u.shape)
        begin, end = schedule.time(first), schedule.time(last)
        t = begin + u * (end - begin)
        log_snr, slope = jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))
        return t, log_snr, slope * (begin - end)

    def draw(number: Array | int) -> Array:
        return rng.normal(rng.stream(keys, rng.Stream.FORWARD, number), x0.shape[1:], x0.dtype)

    def term(_: None, number: Array) -> tuple[None, tuple[Array, Array]]:
        t, log_snr, weight = place(number)
        # The frame does not matter here, and the denoiser knows that of its schedule.
        node = Node(t, *schedule.levels(log_snr))
        predicted = denoiser(diffuse(x0, draw(number), node).astype(x0.dtype), node).x0
        error = masked_mean((predicted - x0).astype(jnp.float32) ** 2, mask)
        return None, (0.5 * weight * jnp.exp(log_snr) * error, log_snr)

    _, (nats, log_snr) = jax.lax.scan(term, None, jnp.arange(num_points))
    reconstruction = -masked_mean(_log_decoder(x0, draw(num_points), first, num_levels), mask)
    prior = prior_term(x0, Node(jnp.ones_like(last), *variance_preserving(last)), mask=mask)
    prior, nats, reconstruction = (a / math.log(2) for a in (prior, nats, reconstruction))
    diffusion = jnp.mean(nats, axis=0)
    terms = ContinuousTerms(prior, diffusion, reconstruction, _error(nats), nats, log_snr)
    return prior + diffusion + reconstruction, terms


def _ends(schedule: Schedule, log_snr_min: float, log_snr_max: float) -> tuple[Array, Array]:
    """Returns the log-SNR at which the bound's process starts, and that at which it ends, `()`."""
    discrete = schedule.num_steps is not None
    t = (0, schedule.num_steps - 1) if discrete else (0.0, 1.0)
    first = jnp.minimum(schedule.log_snr(t[0]), log_snr_max)
    last = jnp.maximum(schedule.log_snr(t[1]), log_snr_min)
    if is_concrete(first) and is_concrete(last) and not first > last:
        raise ValueError(
            f"the schedule must have log-SNRs between log_snr_min and log_snr_max, {log_snr_min} "
            f"and {log_snr_max}: it goes from {schedule.log_snr(t[0])} to {schedule.log_snr(t[1])}"
        )
    return first, last


def _log_decoder(x0: Array, eps: Array, log_snr: Array, num_levels: int) -> Array:
    """Returns log p(x0 | z_0), eq. (4), for each coordinate, where z_0/alpha_0 = x0 + r eps."""
    inverse = jnp.exp(log_snr / 2)  # 1 / r
    levels = jnp.linspace(-1, 1, num_levels, dtype=x0.dtype)

    def exponent(v: Array) -> Array:
        return -0.5 * (inverse * (v - x0) - eps) ** 2

    # One level at a time: all at once would take `num_levels` times the memory of the data.
    total, _ = jax.lax.scan(
        lambda total, v: (jnp.logaddexp(total, exponent(v)), None),
        jnp.full_like(x0, -jnp.inf),
        levels,
    )
    return -0.5 * eps**2 - total


def _error(nats: Array) -> Array:
    """Returns the standard error of the mean over evenly spread points (von Neumann 1941)."""
    num = nats.shape[0]
    if num == 1:
        return jnp.full_like(nats[0], jnp.nan)
    return jnp.sqrt(jnp.sum(jnp.diff(nats, axis=0) ** 2, axis=0) / (2 * (num - 1) * num))


def _check_options(
    schedule: Schedule, num_points: int, points: str, sampling: str, num_levels: int
) -> None:
    check_num_levels(num_levels)
    if num_points < 1:
        raise ValueError(f"num_points must be at least 1, got {num_points}")
    if points not in get_args(Points):
        raise ValueError(f'points must be "low_discrepancy" or "grid", got {points!r}')
    if sampling not in get_args(Sampling):
        raise ValueError(f'sampling must be "log_snr" or "time", got {sampling!r}')
    if sampling == "time" and schedule.num_steps is not None:
        raise ValueError(
            'sampling="time" needs a continuous schedule, got a discrete one: say "log_snr", or '
            "take schedules.interpolated and a denoiser that is told its times"
        )
