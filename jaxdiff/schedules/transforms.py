"""Schedules made of other schedules: shifted, cut off, cut into steps, joined from steps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff._checks import is_concrete
from jaxdiff.base import Array
from jaxdiff.schedules.continuous import (
    ContinuousSchedule,
    log_snr_of_beta,
    variance_preserving,
)
from jaxdiff.schedules.discrete import (
    NoiseSchedule,
    check_num_steps,
    from_alphas_bar,
    log_alphas_bar,
)


def shifted(schedule: ContinuousSchedule, factor: float) -> ContinuousSchedule:
    """Moves the whole schedule to lower log-SNR, as images of more pixels need.

    l(t) - 2 log(factor) at the same t. With factor = size / (size the schedule is good for) this is
    simple diffusion's shift (Hoogeboom et al. 2023, section 3.1). On `rectified_flow` it is
    sigma = factor t / (1 + (factor - 1) t), the shift of Stable Diffusion 3 (Esser et al. 2024,
    eq. 23).

    The network is told t of the shifted schedule, which means another noise than t of `schedule`.
    To visit shifted noise levels with a network trained on `schedule`, take the times
    `schedule.time(shifted(schedule, factor).log_snr(t))` of `schedule` itself.

    Args:
      schedule: any continuous schedule.
      factor: more than 1 for more noise, less for less; positive.

    Raises:
      ValueError: `factor` is not positive.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be positive, got {factor}")
    change = 2 * math.log(factor)
    return schedule._replace(
        name=f"shifted({schedule.name}, {factor})",
        curve=lambda t: schedule.curve(t) - change,
        inverse=lambda log_snr: schedule.inverse(log_snr + change),
    )


def truncated(
    schedule: ContinuousSchedule, log_snr_min: float = -15.0, log_snr_max: float = 15.0
) -> ContinuousSchedule:
    """Cuts the schedule off at both ends, so that the log-SNR is finite (as Hoogeboom et al. 2023).

    The time runs linearly from where the log-SNR is `log_snr_max` to where it is `log_snr_min`; an
    end of the schedule that lies between these stays. In float32 the ends are met to about 1e-3.

    Args:
      schedule: any continuous schedule.
      log_snr_min: the lowest log-SNR, finite.
      log_snr_max: the highest, finite.

    Raises:
      ValueError: the bounds are not finite or not in order, or the schedule has no log-SNR between
        them.
    """
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise ValueError(
            f"log_snr_min must be less than log_snr_max, both finite, got {log_snr_min} and "
            f"{log_snr_max}"
        )

    def interval(dtype: jnp.dtype) -> tuple[Array, Array]:
        first = schedule.time(jnp.asarray(log_snr_max, dtype))
        return first, schedule.time(jnp.asarray(log_snr_min, dtype)) - first

    _, length = interval(jnp.float32)
    if is_concrete(length) and not length > 0:
        raise ValueError(
            f"{schedule.name} has no log-SNR between {log_snr_min} and {log_snr_max}: it goes from "
            f"{schedule.log_snr(0.0)} to {schedule.log_snr(1.0)}"
        )

    def curve(t: Array) -> Array:
        first, length = interval(t.dtype)
        # Rounding could lead beyond t = 1, where there is nothing.
        log_snr = schedule.curve(jnp.minimum(first + length * t, 1))
        return jnp.clip(log_snr, log_snr_min, log_snr_max)

    def inverse(log_snr: Array) -> Array:
        first, length = interval(log_snr.dtype)
        return (schedule.time(log_snr) - first) / length

    return schedule._replace(
        name=f"truncated({schedule.name}, {log_snr_min}, {log_snr_max})",
        curve=curve,
        inverse=inverse,
        ends_at_zero_snr=False,
    )


def discretized(schedule: ContinuousSchedule, num_steps: int) -> NoiseSchedule:
    """Cuts a variance-preserving schedule into T steps: index i is the time (i + 1) / T.

    Computed in float64.

    Args:
      schedule: a continuous schedule with alpha² + sigma² = 1.
      num_steps: T.

    Raises:
      ValueError: `num_steps` is not a positive integer, the schedule is of another family, its
        values are not known (inside of a compiled program), or it is so steep that two steps have
        the same signal.
    """
    check_num_steps(num_steps)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        node = schedule.at(jnp.asarray(np.arange(1, num_steps + 1) / num_steps, jnp.float64))
    if not is_concrete(node.alpha):
        raise ValueError(
            f"{schedule.name} is cut into steps on the host and its values must be known: do it "
            "outside of jit"
        )
    alpha, sigma = np.asarray(node.alpha), np.asarray(node.sigma)
    if not np.allclose(alpha**2 + sigma**2, 1, rtol=0, atol=1e-6):
        raise ValueError(
            "a discrete schedule is variance preserving, alpha² + sigma² = 1, got "
            f"{schedule.name} with {alpha[-1]}² + {sigma[-1]}² at t = 1: keep it continuous, or "
            "take a VP schedule with the same log-SNR: "
            "schedule._replace(levels=schedules.variance_preserving)"
        )
    return from_alphas_bar(alpha**2)


def interpolated(schedule: NoiseSchedule) -> ContinuousSchedule:
    """Joins the T steps of a discrete schedule: index i becomes the time (i + 1) / T.

    Between indices log(alpha_bar) is linear in t (as in the code of DPM-Solver, Lu et al. 2022),
    so that beta(t) = -T log(1 - beta_i) in each step: this is the schedule whose SDE `process.sde`
    is. Before the first index the line goes on to clean data, alpha = 1 at t = 0. If the last alpha
    is exactly 0, no such line exists in the last step; there alpha itself is linear in t.

    `discretized(interpolated(schedule), T)` is `schedule` again. A network trained on `schedule` is
    told the index, T t - 1, not t.

    Args:
      schedule: any discrete schedule, T steps.

    Raises:
      ValueError: the schedule's values are not known (inside of a compiled program).
    """
    steps, vanishes = schedule.num_steps, schedule.ends_at_zero_snr
    kept = steps - 1 if vanishes else steps
    # The integral of beta, -log(alpha_bar), at the times i/T.
    table = np.concatenate([[0.0], -log_alphas_bar(schedule)[:kept]])
    knots = np.arange(kept + 1) / steps

    def curve(t: Array) -> Array:
        integral = jnp.interp(t, jnp.asarray(knots, t.dtype), jnp.asarray(table, t.dtype))
        if vanishes:
            integral = integral - 2 * jnp.log1p(-jnp.clip(t * steps - kept, 0, 1))
        return log_snr_of_beta(integral)

    def inverse(log_snr: Array) -> Array:
        integral = jax.nn.softplus(-log_snr)
        dtype = log_snr.dtype
        t = jnp.interp(integral, jnp.asarray(table, dtype), jnp.asarray(knots, dtype))
        if vanishes:
            t = t - jnp.expm1(-jnp.maximum(integral - table[-1], 0) / 2) / steps
        return t

    return ContinuousSchedule(
        f"interpolated({steps} steps)",
        curve,
        inverse,
        variance_preserving,
        ends_at_zero_snr=vanishes,
    )
