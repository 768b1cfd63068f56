"""Spacings by noise: N values of the noise-to-signal ratio r = sigma/alpha, log-SNR -2 log r.

    uniform_log_snr, exponential     log r_i on a line        (Lu et al. 2022, section 3.4)
    karras                           r_i^(1/rho) on a line    (Karras et al. 2022, eq. 5)
    from_sigmas                      r_i of your own          (Sabour et al. 2024)

On a discrete schedule the nodes lie at fractional indices, as many as asked for. They cannot start
where there is no signal, r being infinite there.

Example:
  >>> from jaxdiff import schedules
  >>> print(*(f"{sigma:.3f}" for sigma in karras(schedules.edm(), 5).sigma))
  80.000 17.528 2.515 0.170 0.002 0.000
  >>> karras(schedules.linear(), 5).t.round(1)
  Array([999. , 843.4, 593. , 141.8,   0. ,  -1. ], dtype=float32)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from jaxdiff.base import Node, Schedule
from jaxdiff.grids import _nodes

_LAST_SIGMA = 0.002  # where a continuous schedule has clean data at t = 0 (Karras et al. 2022)


def uniform_log_snr(
    schedule: Schedule,
    num_steps: int,
    *,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    clean: bool = True,
) -> Node:
    """Equal distances in log-SNR, which are equal ratios of sigma/alpha (Lu et al. 2022).

    The natural grid of solvers that work in the log-SNR; k-diffusion has it as "exponential".

    Args:
      schedule: the schedule.
      num_steps: N.
      sigma_max: sigma/alpha of the noisiest node; by default the schedule's own, which must be
        finite.
      sigma_min: sigma/alpha of the cleanest noisy node; by default the schedule's own, or 0.002 for
        a continuous schedule that starts from clean data.
      clean: whether to end at clean data, or else at `sigma_min`.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`; t is float.

    Raises:
      ValueError: `num_steps` is not a positive integer, the ends are not in order or not in the
        schedule's range, or the schedule starts from zero signal and `sigma_max` is not given. So
        do the spacings below.
    """
    log_snr = np.linspace(*_ends(schedule, num_steps, sigma_max, sigma_min), num_steps)
    return _at_log_snr(schedule, log_snr, clean)


exponential = uniform_log_snr
"""k-diffusion's name of `uniform_log_snr`."""


def karras(
    schedule: Schedule,
    num_steps: int,
    rho: float = 7.0,
    *,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    clean: bool = True,
) -> Node:
    """(sigma/alpha)^(1/rho) at equal distances (Karras et al. 2022, eq. 5).

    Args:
      schedule: the schedule.
      num_steps: N.
      rho: positive; the larger, the shorter the steps at low noise. 7 is the paper's.
      sigma_max: sigma/alpha of the noisiest node, see `uniform_log_snr`; the paper's is 80.
      sigma_min: sigma/alpha of the cleanest noisy node; the paper's is 0.002.
      clean: whether to end at clean data, or else at `sigma_min`.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`; t is float.

    Raises:
      ValueError: `rho` is not positive.
    """
    ends = _ends(schedule, num_steps, sigma_max, sigma_min)
    return _at_log_snr(schedule, karras_log_snr(*ends, num_steps, rho), clean)


def from_sigmas(
    schedule: Schedule, sigmas: ArrayLike, num_steps: int | None = None, *, clean: bool = True
) -> Node:
    """Noise levels of your own, such as those optimised for a model (Sabour et al. 2024).

    Args:
      schedule: the schedule.
      sigmas: sigma/alpha `(K,)`, positive and decreasing, without the 0 of clean data.
      num_steps: N; if given and not K, the list is interpolated, log(sigma/alpha) being linear
        between its entries, as in the paper.
      clean: whether to end at clean data, or else at the last of `sigmas`.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`; t is float.

    Raises:
      ValueError: `sigmas` is not such a vector or leaves the schedule's range, or `num_steps` is
        not a positive integer.
    """
    sigmas = np.asarray(sigmas, np.float64)
    is_vector = sigmas.ndim == 1 and sigmas.size > 0
    if not (is_vector and np.all(sigmas > 0) and np.all(np.diff(sigmas) < 0)):
        raise ValueError(
            "sigmas must be a vector of positive values that decrease strictly (the clean node is "
            f"added by clean=True, not by a 0), got {sigmas}"
        )
    num_steps = sigmas.size if num_steps is None else num_steps
    _nodes.check_count("num_steps", num_steps)
    _nodes.check_schedule(schedule)
    ends = [check_sigma(schedule, "sigmas", sigma) for sigma in (sigmas[0], sigmas[-1])]
    if sigmas.size == 1 and num_steps > 1:
        raise ValueError(f"one sigma cannot be interpolated to num_steps = {num_steps}: give two")
    places = np.linspace(0, sigmas.size - 1, num_steps)
    known = np.clip(-2 * np.log(sigmas), *ends)
    log_snr = np.interp(places, np.arange(sigmas.size), known)
    return _at_log_snr(schedule, log_snr, clean)


def karras_log_snr(noisiest: float, cleanest: float, num: int, rho: float) -> np.ndarray:
    """Returns `num` log-SNRs from `noisiest` to `cleanest`, eq. 5 of Karras et al. 2022."""
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive, got {rho}")
    roots = np.linspace(math.exp(-noisiest / 2 / rho), math.exp(-cleanest / 2 / rho), num)
    return -2 * rho * np.log(roots)


def check_sigma(schedule: Schedule, name: str, sigma: float) -> float:
    """Returns the log-SNR of a noise-to-signal ratio, which must be one of the schedule's.

    A hundredth beyond an end is taken for the end itself, as published levels are rounded.

    Raises:
      ValueError: it is not.
    """
    noisiest, cleanest = _nodes.log_snr_range(schedule, has_signal=True)
    log_snr = -2 * math.log(sigma) if 0 < sigma < math.inf else math.nan
    if not noisiest - 0.02 <= log_snr <= cleanest + 0.02:
        low, high = (math.exp(-end / 2) for end in (cleanest, noisiest))
        raise ValueError(
            f"{name} must be positive and within the schedule's range of sigma/alpha, "
            f"{low:.6g} to {high:.6g}, got {sigma}"
        )
    return min(max(log_snr, noisiest), cleanest)


def _ends(
    schedule: Schedule, num_steps: int, sigma_max: float | None, sigma_min: float | None
) -> tuple[float, float]:
    """Returns the log-SNRs of the noisiest and of the cleanest node, after the checks."""
    _nodes.check_schedule(schedule)
    _nodes.check_count("num_steps", num_steps)
    noisiest, cleanest = _nodes.log_snr_range(schedule)
    if sigma_max is not None:
        noisiest = check_sigma(schedule, "sigma_max", sigma_max)
    elif math.isinf(noisiest):
        raise ValueError(
            "the schedule starts from zero signal, where the log-SNR is infinite: give sigma_max, "
            "say 80, or use a spacing by time (trailing, linspace), which may start there"
        )
    if sigma_min is not None:
        cleanest = check_sigma(schedule, "sigma_min", sigma_min)
    elif math.isinf(cleanest):
        cleanest = -2 * math.log(_LAST_SIGMA)
    if noisiest > cleanest or (noisiest == cleanest and num_steps > 1):
        high, low = (math.exp(-end / 2) for end in (noisiest, cleanest))
        raise ValueError(f"sigma_max must be more than sigma_min, got {high:.6g} and {low:.6g}")
    return noisiest, cleanest


def _at_log_snr(schedule: Schedule, log_snr: np.ndarray, clean: bool) -> Node:
    nodes = _nodes.at_log_snr(schedule, log_snr)
    return _nodes.join([nodes, _nodes.clean_node(schedule)] if clean else [nodes])
