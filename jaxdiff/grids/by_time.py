"""Spacings by time: N of the indices of a discrete schedule, or of the times of a continuous one.

    trailing     t_i = T - i T/N - 1, or 1 - i/N        (Lin et al. 2023, table 2)
    leading      t_i = (N-1-i) T/N                      (the same; Ho et al. 2020)
    linspace     t_i on a line                          (the same)
    quadratic    sqrt(t_i) on a line                    (Song et al. 2021, appendix D.2)
    beta         t_i at quantiles of a Beta distribution (Lee et al. 2024)

They visit whole indices of a discrete schedule, each at most once; with N = T all are the same.
They may start where there is no signal at all.

Example:
  >>> from jaxdiff import schedules
  >>> schedule = schedules.linear()
  >>> leading(schedule, 5).t.tolist()
  [800, 600, 400, 200, 0, -1]
  >>> linspace(schedule, 5).t.tolist()
  [999, 749, 500, 250, 0, -1]
  >>> quadratic(schedule, 5).t.tolist()
  [999, 562, 250, 62, 0, -1]
  >>> trailing(schedules.rectified_flow(), 4).t.tolist()
  [1.0, 0.75, 0.5, 0.25, 0.0]
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from jaxdiff.base import Node, Schedule
from jaxdiff.grids import _nodes

_LAST_TIME = 1e-3  # where a continuous schedule has clean data at t = 0 (Song et al. 2021)


def trailing(schedule: Schedule, num_steps: int, *, clean: bool = True) -> Node:
    """Equal strides counted back from the noisiest time: round(T - i T/N) - 1, or t = 1 - i/N.

    It always starts at pure noise, which makes it the right one for few steps (Lin et al. 2023).

    Args:
      schedule: the schedule.
      num_steps: N, from 1 to T for a discrete schedule.
      clean: whether to end at clean data, or else at the last time visited.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: `num_steps` is not an integer from 1 to T, or not a positive one.
    """
    _span(schedule, num_steps)
    steps, total = np.arange(num_steps), schedule.num_steps
    if total is None:
        return from_timesteps(schedule, 1 - steps / num_steps, clean=clean)
    return from_timesteps(schedule, np.round(total - steps * total / num_steps) - 1, clean=clean)


def leading(schedule: Schedule, num_steps: int, *, clean: bool = True) -> Node:
    """Equal strides counted up from index 0: floor(i T/N), visited backwards.

    The spacing of Ho et al.'s and Song et al.'s code. It never visits the last index unless
    N = T. Where N does not divide T, the strides differ by one and still span the schedule.

    Args:
      schedule: a discrete schedule, T steps. (In continuous time index 0 is clean data itself.)
      num_steps: N, from 1 to T.
      clean: whether to end at clean data, or else at the last index visited.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: `num_steps` is not an integer from 1 to T, or the schedule is continuous.
    """
    if schedule.num_steps is None:
        raise ValueError(
            "leading counts up from index 0, which in continuous time is clean data itself: use "
            "trailing, which starts at pure noise, or linspace"
        )
    _span(schedule, num_steps)
    steps = np.arange(num_steps)[::-1]
    return from_timesteps(schedule, steps * schedule.num_steps // num_steps, clean=clean)


def linspace(
    schedule: Schedule, num_steps: int, *, end: float | None = None, clean: bool = True
) -> Node:
    """From the noisiest time to `end`, both visited, at equal distances (rounded to indices).

    Args:
      schedule: the schedule.
      num_steps: N, from 1 to the number of indices.
      end: the last noisy time. The default is index 0; for a continuous schedule 0.001, or 0 where
        even that is noisy.
      clean: whether to end at clean data, or else at `end`.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: `num_steps` is not an integer from 1 to the number of indices, or `end` not a
        noisy time of the schedule. So do `quadratic` and `beta`.
    """
    start, end = _span(schedule, num_steps, end)
    return _at_targets(schedule, np.linspace(start, end, num_steps), clean)


def quadratic(
    schedule: Schedule, num_steps: int, *, end: float | None = None, clean: bool = True
) -> Node:
    """As `linspace`, but of the square roots of the times: dense near the data.

    The "quadratic" of Song et al. 2021 (appendix D.2), there for CIFAR-10. Where squares round to
    the same index, the next free one is taken.

    Args:
      schedule: the schedule.
      num_steps: N.
      end: the last noisy time, see `linspace`.
      clean: whether to end at clean data, or else at `end`.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.
    """
    start, end = _span(schedule, num_steps, end)
    return _at_targets(schedule, np.linspace(start**0.5, end**0.5, num_steps) ** 2, clean)


def beta(
    schedule: Schedule,
    num_steps: int,
    a: float = 0.6,
    b: float = 0.6,
    *,
    end: float | None = None,
    clean: bool = True,
) -> Node:
    """Times at equally spaced quantiles of the Beta(a, b) distribution (Lee et al. 2024).

    With a, b < 1 it is dense at both ends; a = b = 1 is `linspace`.

    Args:
      schedule: the schedule.
      num_steps: N.
      a: less than 1 for more nodes near the data; positive.
      b: less than 1 for more nodes near the noise; positive.
      end: the last noisy time, see `linspace`.
      clean: whether to end at clean data, or else at `end`.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: `a` or `b` is not positive, or so small that nodes fall on top of each other.
    """
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ValueError(f"a and b must be positive, got {a} and {b}")
    start, end = _span(schedule, num_steps, end)
    levels = np.linspace(1, 0, num_steps)
    return _at_targets(schedule, end + (start - end) * _beta_quantiles(levels, a, b), clean)


def from_timesteps(schedule: Schedule, timesteps: ArrayLike, *, clean: bool = True) -> Node:
    """A grid of times of your own.

    Args:
      schedule: the schedule.
      timesteps: `(N,)`, in the order of the visits, from noise to data. For a discrete schedule
        indices in `[0, T-1]`, which may be fractional: such a node has the log-SNR interpolated
        between its neighbours'. For a continuous one floats in [0, 1], at which there is noise.
      clean: whether to end at clean data, or else at the last time visited.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`. t is int32 if all are whole indices.

    Raises:
      ValueError: the times are not a vector in range that decreases strictly.
    """
    _nodes.check_schedule(schedule)
    given = np.asarray(timesteps)
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.number):
        raise ValueError(f"timesteps must be a vector of at least one number, got {given}")
    t = given.astype(np.float64)
    first = 1 if schedule.num_steps is None else schedule.num_steps - 1
    # Not the negation of the opposite: a NaN is refused, too.
    if not (np.all(np.diff(t) < 0) and t[0] <= first and t[-1] >= 0):
        raise ValueError(
            f"timesteps must decrease strictly, from at most {first} to at least 0, got {given}"
        )
    nodes = _nodes.at_times(schedule, t)
    if nodes.sigma[-1] == 0:
        raise ValueError(
            f"timesteps must be noisy, but at t = {t[-1]} data is clean: leave it out (clean=True "
            "adds the clean node)"
        )
    return _nodes.join([nodes, _nodes.clean_node(schedule)] if clean else [nodes])


def _span(schedule: Schedule, num_steps: int, end: float | None = None) -> tuple[float, float]:
    """Returns the noisiest time and the last noisy one, after the checks."""
    _nodes.check_schedule(schedule)
    total = schedule.num_steps
    if total is None:
        _nodes.check_count("num_steps", num_steps)
        if end is None:
            end = _LAST_TIME if math.isinf(_nodes.log_snr_range(schedule)[1]) else 0.0
        if not 0 <= end < 1:
            raise ValueError(f"end must be a time in [0, 1), got {end}")
        return 1.0, end
    end = 0 if end is None else end
    if end not in range(total):
        raise ValueError(f"end must be an index from 0 to {total - 1}, got {end!r}")
    _nodes.check_count("num_steps", num_steps, total - int(end), "the schedule's ")
    return total - 1, int(end)


def _at_targets(schedule: Schedule, targets: np.ndarray, clean: bool) -> Node:
    """Makes the grid of decreasing times, rounded to distinct indices of a discrete schedule."""
    if schedule.num_steps is not None:
        rank, rounded = np.arange(targets.size), np.round(targets)[::-1]
        # Each at least one above the last, and none so high that the rest would not fit.
        rounded = np.maximum.accumulate(rounded - rank) + rank
        targets = np.minimum(rounded, np.round(targets[0]) - rank[::-1])[::-1]
    return from_timesteps(schedule, targets, clean=clean)


def _beta_quantiles(levels: np.ndarray, a: float, b: float) -> np.ndarray:
    from scipy.special import betaincinv  # here, as it takes longer to import than all of jaxdiff

    # To a resolution that no schedule tells apart, so that nodes closer than that are refused.
    return np.rint(betaincinv(a, b, levels) * 2.0**60) / 2.0**60
