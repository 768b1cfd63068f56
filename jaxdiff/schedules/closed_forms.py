"""The continuous schedules of the literature, each in closed form.

| schedule | family | alpha or log-SNR l | ends (t = 0, t = 1) |
| --- | --- | --- | --- |
| `vp_linear` | variance preserving | alpha² = exp(-B), B'(t) on a line | clean, noisy |
| `vp_cosine` | variance preserving | alpha on a cosine | clean, no signal |
| `vp_sigmoid` | variance preserving | alpha² on a logistic curve | clean, no signal |
| `laplace` | variance preserving | l Laplace-distributed | clean, no signal |
| `sub_vp` | sub-variance | alpha as `vp_linear` | clean, noisy |
| `rectified_flow` | straight line | alpha = 1 - t | clean, no signal |
| `ve` | variance exploding | sigma in equal ratios | sigma_min, sigma_max |
| `edm` | variance exploding | sigma^(1/rho) on a line | sigma_min, sigma_max |

Example:
  >>> schedule = vp_linear()
  >>> node = schedule.at(0.5)
  >>> print(f"{node.alpha:.4f} {node.sigma:.4f} {schedule.log_snr(0.5):.4f}")
  0.2812 0.9597 -2.4551
  >>> print(f"{schedule.time(-2.4551):.4f}")
  0.5000
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.base import Array
from jaxdiff.schedules.continuous import (
    ContinuousSchedule,
    log_snr_of_beta,
    straight_line,
    sub_variance,
    variance_exploding,
    variance_preserving,
)


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> ContinuousSchedule:
    """The variance-preserving SDE with beta(t) on a line (Song et al. 2021, appendix C).

    alpha = exp(-B/2), sigma² = 1 - exp(-B), B(t) = beta_min t + (beta_max - beta_min) t²/2: the
    limit of `linear(T, beta_min / T, beta_max / T)`.

    Args:
      beta_min: beta(0), positive.
      beta_max: beta(1), at least `beta_min`.

    Raises:
      ValueError: 0 < beta_min <= beta_max does not hold.
    """
    integral, inverse = _linear_beta(beta_min, beta_max)
    return ContinuousSchedule(
        f"vp_linear({beta_min}, {beta_max})",
        lambda t: log_snr_of_beta(integral(t)),
        lambda log_snr: inverse(jax.nn.softplus(-log_snr)),
        variance_preserving,
    )


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> ContinuousSchedule:
    """The sub-VP SDE: `vp_linear`'s alpha with less noise (Song et al. 2021, eq. 29).

    alpha = exp(-B/2), sigma = 1 - exp(-B), B as in `vp_linear`.

    Args:
      beta_min: beta(0), positive.
      beta_max: beta(1), at least `beta_min`.

    Raises:
      ValueError: 0 < beta_min <= beta_max does not hold.
    """
    integral, inverse = _linear_beta(beta_min, beta_max)

    def curve(t: Array) -> Array:
        return -integral(t) - 2 * jnp.log(-jnp.expm1(-integral(t)))

    return ContinuousSchedule(
        f"sub_vp({beta_min}, {beta_max})",
        curve,
        lambda log_snr: inverse(2 * jnp.arcsinh(jnp.exp(-log_snr / 2) / 2)),
        sub_variance,
    )


def vp_cosine(s: float = 0.0) -> ContinuousSchedule:
    """alpha² on a squared cosine (Nichol & Dhariwal 2021, eq. 17), without clipping.

    alpha = cos(a(t)) / cos(a(0)), a(t) = (t + s) / (1 + s) pi/2. With s = 0 alpha = cos(pi t/2),
    sigma = sin(pi t/2), l = -2 log tan(pi t/2) (Kingma & Gao 2023; Hoogeboom et al. 2023). It ends
    at exactly zero signal; see `truncated`.

    Args:
      s: the offset of Nichol & Dhariwal (0.008 there), not negative.

    Raises:
      ValueError: `s` is negative or not finite.
    """
    if not 0 <= s < math.inf:
        raise ValueError(f"s must be finite and not negative, got {s}")
    h = math.pi / 2 / (1 + s)
    cos0, sin0 = math.cos(h * s), math.sin(h * s)

    # cos a = sin(pi/2 - a), and cos²(a0) - cos²(a) = sin(a - a0) sin(a + a0).
    def curve(t: Array) -> Array:
        noise = jnp.log(jnp.sin(h * t)) + jnp.log(jnp.sin(h * (t + 2 * s)))
        return 2 * jnp.log(jnp.sin(h * (1 - t))) - noise

    # With the angle a's cosine cos0 alpha, a - a0 by its sine and cosine.
    def inverse(log_snr: Array) -> Array:
        alpha, sigma = variance_preserving(log_snr)
        sin = jnp.hypot(cos0 * sigma, jnp.asarray(sin0, sigma.dtype))
        tiny = jnp.finfo(sigma.dtype).tiny  # for clean data with s = 0
        sin_of_difference = cos0 * sigma * (sigma / jnp.maximum(sin + sin0 * alpha, tiny))
        return jnp.arctan2(sin_of_difference, cos0**2 * alpha + sin0 * sin) / h

    return ContinuousSchedule(
        f"vp_cosine({s})", curve, inverse, variance_preserving, ends_at_zero_snr=True
    )


def vp_sigmoid(start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> ContinuousSchedule:
    """alpha² on a logistic curve (Jabri et al. 2022; Chen 2023, algorithm 1).

    alpha² = (S(end) - S(z)) / (S(end) - S(start)), S(z) = sigmoid(z / tau), with z from start to
    end: exactly clean at t = 0 and zero signal at t = 1, where the paper clips alpha² at 1e-9; see
    `truncated`.

    Args:
      start: where on the logistic curve t = 0 is.
      end: where t = 1 is, more than `start`.
      tau: the temperature, positive.

    Raises:
      ValueError: `end` is not more than `start`, or `tau` not positive.
    """
    if not (-math.inf < start < end < math.inf and 0 < tau < math.inf):
        raise ValueError(f"need start < end and tau > 0, got {start}, {end} and {tau}")
    width = (end - start) / tau
    # S(a) - S(b) = sinh((a-b)/2) / (2 cosh(a/2) cosh(b/2)) in units of tau; all but this cancels.
    offset = float(_log_cosh(start / tau / 2) - _log_cosh(end / tau / 2))

    def log_sinh(rest: Array) -> Array:  # log(2 sinh(rest * width / 2)) - rest * width / 2
        return jnp.log(-jnp.expm1(-width * rest))

    def curve(t: Array) -> Array:
        return offset + width * (0.5 - t) + log_sinh(1 - t) - log_sinh(t)

    def inverse(log_snr: Array) -> Array:
        below = jnp.logaddexp(log_snr - offset - width / 2, jnp.asarray(-width, log_snr.dtype))
        return jax.nn.softplus(math.log(-math.expm1(-width)) - below) / width

    return ContinuousSchedule(
        f"vp_sigmoid({start}, {end}, {tau})",
        curve,
        inverse,
        variance_preserving,
        ends_at_zero_snr=True,
    )


def laplace(mean: float = 0.0, scale: float = 0.5) -> ContinuousSchedule:
    """Log-SNRs that follow a Laplace distribution when t is uniform (Hang et al. 2024).

    l(t) = mean - scale sgn(1/2 - t) log(1 - 2 |t - 1/2|), variance preserving.

    Args:
      mean: the log-SNR around which training concentrates.
      scale: the width of the distribution, positive.

    Raises:
      ValueError: `scale` is not positive.
    """
    if not (math.isfinite(mean) and 0 < scale < math.inf):
        raise ValueError(f"scale must be positive and mean finite, got {scale} and {mean}")

    def curve(t: Array) -> Array:
        return mean + scale * jnp.where(t < 0.5, -jnp.log(2 * t), jnp.log(2 * (1 - t)))

    def inverse(log_snr: Array) -> Array:
        tail = jnp.exp(-jnp.abs(log_snr - mean) / scale) / 2
        return jnp.where(log_snr > mean, tail, 1 - tail)

    return ContinuousSchedule(
        f"laplace({mean}, {scale})", curve, inverse, variance_preserving, ends_at_zero_snr=True
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> ContinuousSchedule:
    """The variance-exploding SDE: sigma in equal ratios (Song et al. 2021, appendix C).

    alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t. At t = 0 data are not quite clean.

    Args:
      sigma_min: the noise at t = 0, positive.
      sigma_max: the noise at t = 1, more than `sigma_min`.

    Raises:
      ValueError: 0 < sigma_min < sigma_max does not hold.
    """
    _check_sigmas(sigma_min, sigma_max)
    start, slope = -2 * math.log(sigma_min), -2 * math.log(sigma_max / sigma_min)
    return ContinuousSchedule(
        f"ve({sigma_min}, {sigma_max})",
        lambda t: start + slope * t,
        lambda log_snr: (log_snr - start) / slope,
        variance_exploding,
    )


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> ContinuousSchedule:
    """Sigma on the curve of Karras et al. 2022, eq. 5: times 1 - i/(N-1) are their N steps.

    alpha = 1, sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho. (Their
    networks are told sigma; here a network is told t.)

    Args:
      sigma_min: the noise at t = 0, positive.
      sigma_max: the noise at t = 1, more than `sigma_min`.
      rho: how much longer the steps are at high noise, positive; 1 is a line.

    Raises:
      ValueError: 0 < sigma_min < sigma_max or rho > 0 does not hold.
    """
    _check_sigmas(sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive, got {rho}")
    start = sigma_min ** (1 / rho)
    rise = (sigma_max / sigma_min) ** (1 / rho) - 1  # in units of start

    def curve(t: Array) -> Array:
        return -2 * (math.log(sigma_min) + rho * jnp.log1p(rise * t))

    def inverse(log_snr: Array) -> Array:
        return (jnp.exp(-log_snr / (2 * rho)) / start - 1) / rise

    return ContinuousSchedule(
        f"edm({sigma_min}, {sigma_max}, {rho})", curve, inverse, variance_exploding
    )


def rectified_flow() -> ContinuousSchedule:
    """The straight line from data to noise: alpha = 1 - t, sigma = t (Liu et al. 2023).

    Also the "optimal transport" path of flow matching (Lipman et al. 2023, with its time turned
    round and sigma_min = 0).
    """
    return ContinuousSchedule(
        "rectified_flow()",
        lambda t: 2 * (jnp.log1p(-t) - jnp.log(t)),
        lambda log_snr: jax.nn.sigmoid(-log_snr / 2),
        straight_line,
        ends_at_zero_snr=True,
    )


def _linear_beta(
    beta_min: float, beta_max: float
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Returns B(t), the integral of beta from 0 to t, and its inverse."""
    if not 0 < beta_min <= beta_max < math.inf:
        raise ValueError(f"need 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
    slope = beta_max - beta_min

    def inverse(integral: Array) -> Array:
        integral = jnp.minimum(integral, (beta_min + beta_max) / 2)
        # The root of the quadratic in the form that does not cancel.
        return 2 * integral / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * integral))

    return lambda t: t * (beta_min + slope * t / 2), inverse


def _log_cosh(x: float) -> float:
    return abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
