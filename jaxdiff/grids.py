"""Grids: which points of the process a sampler visits.

A grid is one `Node` with `(N+1,)` fields, from noise to data; its last point is clean data (t = -1,
alpha = 1, sigma = 0) unless asked otherwise. Each of the three usual spacings, named as in Lin et
al. 2023 (table 2), takes N of the T indices of a discrete schedule; with N = T all are the same.

Example:
  >>> from jaxdiff import schedules
  >>> schedule = schedules.linear()
  >>> trailing(schedule, 5).t.tolist()
  [999, 799, 599, 399, 199, -1]
  >>> leading(schedule, 5).t.tolist()
  [800, 600, 400, 200, 0, -1]
  >>> linspace(schedule, 5).t.tolist()
  [999, 749, 500, 250, 0, -1]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxdiff._checks import is_concrete
from jaxdiff.base import Node
from jaxdiff.schedules import NoiseSchedule


def trailing(schedule: NoiseSchedule, num_steps: int, *, clean: bool = True) -> Node:
    """Equal strides counted back from the last index: round(T - i T/N) - 1.

    It always starts at pure noise, which makes it the right one for few steps (Lin et al. 2023).

    Args:
      schedule: the schedule, T steps.
      num_steps: N, from 1 to T.
      clean: whether to end at clean data, or else at the last index visited.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: `num_steps` is not an integer from 1 to T.
    """
    total = _check(schedule, num_steps)
    steps = np.arange(num_steps)
    return from_timesteps(schedule, np.round(total - steps * total / num_steps) - 1, clean=clean)


def leading(schedule: NoiseSchedule, num_steps: int, *, clean: bool = True) -> Node:
    """Equal strides counted up from index 0: floor(i T/N), visited backwards.

    The spacing of Ho et al.'s and Song et al.'s code. It never visits the last index unless
    N = T. Where N does not divide T, the strides differ by one and still span the schedule.

    Args:
      schedule: the schedule, T steps.
      num_steps: N, from 1 to T.
      clean: whether to end at clean data, or else at the last index visited.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: `num_steps` is not an integer from 1 to T.
    """
    total = _check(schedule, num_steps)
    steps = np.arange(num_steps)[::-1]
    return from_timesteps(schedule, steps * total // num_steps, clean=clean)


def linspace(schedule: NoiseSchedule, num_steps: int, *, clean: bool = True) -> Node:
    """Both the last index and index 0, and equal distances between, rounded.

    Args:
      schedule: the schedule, T steps.
      num_steps: N, from 1 to T.
      clean: whether to end at clean data, or else at the last index visited.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: `num_steps` is not an integer from 1 to T.
    """
    total = _check(schedule, num_steps)
    return from_timesteps(schedule, np.round(np.linspace(total - 1, 0, num_steps)), clean=clean)


def from_timesteps(schedule: NoiseSchedule, timesteps: ArrayLike, *, clean: bool = True) -> Node:
    """A grid of indices of your own.

    Args:
      schedule: the schedule, T steps.
      timesteps: integers `(N,)` in `0 .. T-1`, in the order of the visits: from noise to data.
      clean: whether to end at clean data, or else at the last index visited.

    Returns:
      The grid, fields `(N+1,)`, or `(N,)` if not `clean`.

    Raises:
      ValueError: the indices are not a vector of integers in range that decreases strictly.
    """
    total = _check(schedule, 1)
    given = np.asarray(timesteps)
    if given.ndim != 1 or not given.size or np.any(given != np.round(given)):
        raise ValueError(f"timesteps must be a vector of integers, got {given}")
    t = given.astype(np.int32)
    if np.any(np.diff(t) >= 0) or t[0] >= total or t[-1] < 0:
        raise ValueError(
            f"timesteps must decrease strictly, from at most {total - 1} to at least 0, got {given}"
        )
    alpha, sigma = np.asarray(schedule.nodes.alpha)[t], np.asarray(schedule.nodes.sigma)[t]
    if clean:
        t, alpha, sigma = np.append(t, -1), np.append(alpha, 1), np.append(sigma, 0)
    with jax.ensure_compile_time_eval():
        return Node(
            jnp.asarray(t, jnp.int32),
            jnp.asarray(alpha, jnp.float32),
            jnp.asarray(sigma, jnp.float32),
        )


def _check(schedule: NoiseSchedule, num_steps: int) -> int:
    total = schedule.num_steps
    if not is_concrete(schedule.nodes.alpha):
        raise ValueError(
            "a grid is computed on the host and needs the schedule's values: make it outside of "
            "jit, or close over the schedule instead of passing it as an argument"
        )
    is_int = isinstance(num_steps, (int, np.integer)) and not isinstance(num_steps, bool)
    if not is_int or not 1 <= num_steps <= total:
        raise ValueError(
            f"num_steps must be an integer from 1 to the schedule's {total}, got {num_steps!r}"
        )
    return total
