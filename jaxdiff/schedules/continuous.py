"""Continuous noise schedules: how fast the data turns into noise over the times t in [0, 1].

A continuous schedule is known by its log-SNR, which falls with t (0 = data), and by the family of
processes that it belongs to, which splits the log-SNR into signal and noise:

    l(t) = log(alpha² / sigma²)                                                            (1)
    variance preserving:    alpha² = sigmoid(l),      sigma² = sigmoid(-l)                 (2)
    variance exploding:     alpha = 1,                sigma = exp(-l/2)                    (3)
    straight line:          alpha = sigmoid(l/2),     sigma = sigmoid(-l/2)                (4)
    sub-variance:           alpha = exp(-B/2),        sigma = 1 - exp(-B),
                            B = 2 asinh(exp(-l/2) / 2)                                     (5)

(2) is all with alpha² + sigma² = 1 (Kingma et al. 2021), (4) all with alpha + sigma = 1, and (5)
all with sigma = 1 - alpha² (Song et al. 2021, eq. 29).

Formulas are written so that no digits are lost at either end: 1 - exp(-B) is an expm1, and where
1 - t is small it is never the small difference of two rounded functions. An end may be exact:
l = +inf at clean data, -inf at zero signal. All is computed in the precision of t, at least
float32; float64 in gives float64 out.

Example:
  >>> slow = ContinuousSchedule("slow", lambda t: 5 - 10 * t, lambda l: (5 - l) / 10, straight_line)
  >>> node = slow.at(0.25)
  >>> print(f"{node.alpha:.4f} {node.sigma:.4f} {slow.log_snr(0.25):.4f} {slow.time(2.5):.4f}")
  0.7773 0.2227 2.5000 0.2500
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff._checks import is_concrete
from jaxdiff.base import Array, Node

Levels = Callable[[Array], tuple[Array, Array]]
"""A family of processes: `log_snr -> (alpha, sigma)`, eqs. (2)-(5)."""


class ContinuousSchedule(NamedTuple):
    """A continuous schedule as pure functions; made by the functions of `jaxdiff.schedules`.

    The methods check and complete what the functions say; with them a schedule of your own is
    `ContinuousSchedule(name, curve, inverse, levels)`.

    Attributes:
      name: the name, for messages.
      curve: `t -> log_snr`, eq. (1), decreasing, elementwise, differentiable where finite.
      inverse: `log_snr -> t`, its inverse, elementwise; outside of the schedule's log-SNRs it may
        return any t outside of (0, 1).
      levels: `log_snr -> (alpha, sigma)`, the family.
      ends_at_zero_snr: whether alpha is exactly 0 at t = 1.
    """

    name: str
    curve: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    levels: Levels
    ends_at_zero_snr: bool = False

    @property
    def num_steps(self) -> None:
        """None: there are no steps."""
        return None

    def at(self, t: Array | float) -> Node:
        """Returns the node at time t.

        Args:
          t: floats in [0, 1], shape `()` or `(B,)`.

        Returns:
          The node, with fields of the shape and type of `t` (float32 for shorter types).

        Raises:
          TypeError: `t` is an array of integers.
          ValueError: a known value of `t` is out of range. In a compiled program such a t gives
            NaN.
        """
        t = _check_time(t)
        return Node(t, *self.levels(self.log_snr(t)))

    def log_snr(self, t: Array | float) -> Array:
        """Returns log(alpha² / sigma²) at time `t`, shape of `t`; errors as `at`."""
        t = _check_time(t)
        return jnp.where((t >= 0) & (t <= 1), self.curve(t), jnp.nan)

    def time(self, log_snr: Array | float) -> Array:
        """Returns the t at which the log-SNR has this value, held within [0, 1]."""
        return jnp.clip(self.inverse(_float(log_snr)), 0, 1)


def variance_preserving(log_snr: Array) -> tuple[Array, Array]:
    """Returns alpha and sigma with alpha² + sigma² = 1, eq. (2), each of the shape of `log_snr`."""
    # Through the logarithm: sigmoid itself would be 0 from -88 on, where its root is 1e-19.
    return _root_sigmoid(log_snr), _root_sigmoid(-log_snr)


def variance_exploding(log_snr: Array) -> tuple[Array, Array]:
    """Returns alpha = 1 and sigma, eq. (3), each of the shape of `log_snr`."""
    return jnp.ones_like(log_snr), jnp.exp(-log_snr / 2)


def straight_line(log_snr: Array) -> tuple[Array, Array]:
    """Returns alpha and sigma with alpha + sigma = 1, eq. (4), each of the shape of `log_snr`."""
    return jax.nn.sigmoid(log_snr / 2), jax.nn.sigmoid(-log_snr / 2)


def sub_variance(log_snr: Array) -> tuple[Array, Array]:
    """Returns alpha and sigma with alpha² + sigma = 1, eq. (5), each of the shape of `log_snr`."""
    half = jnp.arcsinh(jnp.exp(-log_snr / 2) / 2)  # B / 2
    return jnp.exp(-half), -jnp.expm1(-2 * half)


def log_snr_of_beta(integral: Array) -> Array:
    """Returns the log-SNR of alpha² = exp(-B), sigma² = 1 - exp(-B), B >= 0: -log(exp(B) - 1)."""
    return -integral - jnp.log(-jnp.expm1(-integral))


def _root_sigmoid(log_snr: Array) -> Array:
    return jnp.exp(jax.nn.log_sigmoid(log_snr) / 2)


def _float(x: Array | float) -> Array:
    """Returns `x` as floats of at least 32 bits."""
    x = jnp.asarray(float(x) if isinstance(x, int) else x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_time(t: Array | float) -> Array:
    """Returns `t` as an array of floats, after the checks of `ContinuousSchedule.at`."""
    if not isinstance(t, int) and not jnp.issubdtype(jnp.asarray(t).dtype, jnp.floating):
        raise TypeError(
            f"t must be a float in [0, 1] for a continuous schedule, got {jnp.asarray(t).dtype}: "
            "index i of T steps is the time (i + 1) / T"
        )
    t = _float(t)
    if is_concrete(t) and not np.all((np.asarray(t) >= 0) & (np.asarray(t) <= 1)):
        raise ValueError(
            f"t must lie in [0, 1] for a continuous schedule, got values from {np.min(t)} to "
            f"{np.max(t)}"
        )
    return t
