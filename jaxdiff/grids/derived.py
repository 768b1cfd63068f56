"""Grids made of grids: ones that go up again, and ones with nodes between the nodes.

Where a grid goes up, towards noise, the sampling loop adds the noise that is missing and asks no
network (`jaxdiff.sampling`, eq. 1). So what others have as samplers of their own are grids here:
EDM's churn, Restart and RePaint's resampling, each for every solver.

The nodes between nodes are the stages of solvers that take several evaluations a step.

Example:
  >>> from jaxdiff import grids, schedules
  >>> schedule = schedules.linear()
  >>> grid = grids.trailing(schedule, 4)
  >>> with_halves(schedule, grid, 2).t.tolist()
  [999, 874, 749, 624, 499, 249, -1]
  >>> print(*(f"{t:.1f}" for t in churn(schedule, grid, 0.4, s_max=1.0).t))
  999.0 749.0 499.0 249.0 267.1 -1.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxdiff.base import Node, Schedule
from jaxdiff.grids import _nodes
from jaxdiff.grids.by_noise import check_sigma, karras_log_snr


def churn(
    schedule: Schedule,
    grid: Node,
    s_churn: float,
    *,
    s_min: float = 0.0,
    s_max: float = math.inf,
) -> Node:
    """Goes up a little before each step (Karras et al. 2022, algorithm 2).

    From a node with sigma/alpha = r in [s_min, s_max] the grid first goes up to (1 + gamma) r,
    gamma = min(s_churn / N, sqrt(2) - 1), and on from there. The noise added is scaled by
    `sample(up_noise=)`, the paper's S_noise.

    Args:
      schedule: the schedule that the grid was made from.
      grid: fields `(N+1,)`.
      s_churn: the paper's S_churn, not negative; 0 leaves the grid as it is.
      s_min: the least sigma/alpha to go up from.
      s_max: the largest. Nodes may go up beyond the schedule's noisiest; t is held there.

    Returns:
      The grid with a node more for each that goes up, fields `(M,)`.

    Raises:
      ValueError: `s_churn` is negative, `s_min` is more than `s_max`, or the grid's values are not
        known.
    """
    if not 0 <= s_churn < math.inf:
        raise ValueError(f"s_churn must be finite and not negative, got {s_churn}")
    if not s_min <= s_max:
        raise ValueError(f"s_min must not be more than s_max, got {s_min} and {s_max}")
    _nodes.check_schedule(schedule)
    nodes = _nodes.on_host(grid)
    ratio = _nodes.noise_to_signal(nodes)
    gamma = min(s_churn / (ratio.size - 1), math.sqrt(2) - 1)
    # Bounds that are a node's own level mean the node, also in single precision.
    within = (ratio >= s_min * (1 - 1e-6)) & (ratio <= s_max * (1 + 1e-6))
    goes = within & (ratio > 0) & np.isfinite(ratio) & np.append(ratio[1:] < ratio[:-1], False)
    # A climb too small for single precision would be a step that goes nowhere.
    from_here = np.flatnonzero(goes) if gamma > 1e-6 else np.array([], int)
    if not from_here.size:
        return _nodes.join([nodes])
    upper = _nodes.at_log_snr(schedule, -2 * np.log(ratio[from_here] * (1 + gamma)))
    return _inserted(nodes, from_here, upper)


def restart(
    schedule: Schedule,
    grid: Node,
    intervals: Sequence[tuple[int, int, float, float]],
    *,
    rho: float = 7.0,
) -> Node:
    """Goes back up over given intervals, and down them again (Restart, Xu et al. 2023).

    On reaching the node nearest to an interval's lower end, the grid goes up to its upper end in
    one move and comes down in Karras spacing (`karras`), so many times as asked for.

    Args:
      schedule: the schedule that the grid was made from.
      grid: fields `(N+1,)`, which only goes down.
      intervals: for each `(num_restarts, num_steps, sigma_low, sigma_high)`: how many times to go
        up, in how many steps to come down each time, and the ends in sigma/alpha.
      rho: of the spacing within the intervals.

    Returns:
      The grid with `num_restarts * (num_steps + 1)` more moves for each interval.

    Raises:
      ValueError: an interval is not such a tuple, leaves the schedule's range or does not lie above
        the node it starts from, or the grid goes up already or its values are not known.
    """
    _nodes.check_schedule(schedule)
    nodes = _check_goes_down(grid, "restart")
    log_snr = _nodes.log_snr_of(nodes)
    noisy = np.flatnonzero(nodes.sigma > 0)
    loops: dict[int, list[Node]] = {}
    for interval in intervals:
        if len(interval) != 4:
            raise ValueError(
                "each interval must be (num_restarts, num_steps, sigma_low, sigma_high), got "
                f"{interval}"
            )
        num_restarts, num_steps, sigma_low, sigma_high = interval
        _nodes.check_count("num_restarts", num_restarts)
        _nodes.check_count("num_steps", num_steps)
        low = check_sigma(schedule, "sigma_low", sigma_low)
        high = check_sigma(schedule, "sigma_high", sigma_high)
        i = int(noisy[np.argmin(np.abs(log_snr[noisy] - low))])
        if not high < log_snr[i]:
            raise ValueError(
                f"sigma_high must lie above the grid's node nearest to sigma_low = {sigma_low}, "
                f"whose sigma/alpha is {math.exp(-log_snr[i] / 2):.6g}, got {sigma_high}"
            )
        way = karras_log_snr(high, log_snr[i], num_steps + 1, rho)[:-1]
        loop = [_nodes.at_log_snr(schedule, way), nodes[i : i + 1]]
        loops.setdefault(i, []).extend(num_restarts * loop)
    parts = []
    for i in range(nodes.sigma.size):
        parts += [nodes[i : i + 1], *loops.get(i, [])]
    return _nodes.join(parts)


def resample(grid: Node, jump_length: int = 10, num_resamples: int = 10) -> Node:
    """Walks each stretch of the grid several times (RePaint, Lugmayr et al. 2022, appendix B).

    With the noisy nodes numbered 0, 1, ... from the data, the grid goes back up by `jump_length`
    nodes each time it reaches a node whose number is a multiple of `jump_length`, until it has been
    there `num_resamples` times. The defaults are the paper's, for 250 steps. A jump is one move,
    which adds the same noise as the paper's `jump_length` small ones.

    It is for conditions that a solver imposes as it goes, `editing.inpaint` above all: on each
    walk what is known and what is drawn adapt to each other.

    Args:
      grid: fields `(N+1,)`, which only goes down.
      jump_length: how many nodes to go up, less than the number of noisy nodes.
      num_resamples: how many times to walk each stretch; 1 leaves the grid as it is.

    Returns:
      The longer grid.

    Raises:
      ValueError: a number is not an integer in range, or the grid goes up already or its values are
        not known.
    """
    nodes = _check_goes_down(grid, "resample")
    num_noisy = int(np.sum(nodes.sigma > 0))
    _nodes.check_count(
        "jump_length", jump_length, num_noisy - 1, "the number of noisy nodes less one, "
    )
    _nodes.check_count("num_resamples", num_resamples)
    walk = []
    for node in reversed(range(num_noisy)):
        walk.append(node)
        if node % jump_length == 0 and node + jump_length < num_noisy:
            again = range(node + jump_length, node - 1, -1)
            walk += (num_resamples - 1) * list(again)
    # From numbers that count from the data to places in the grid; the clean node stays last.
    places = [num_noisy - 1 - node for node in walk] + list(range(num_noisy, nodes.sigma.size))
    return _nodes.join([nodes[np.array(places)]])


def with_midpoints(schedule: Schedule, grid: Node, stages: int = 2) -> Node:
    """Divides each step into `stages` parts of equal log-SNR: the stages of singlestep solvers.

    For `solvers.dpm_solver(order, "singlestep")` with `stages` = order (Lu et al. 2022, algorithms
    1 and 2, where r1 = 1/2, or 1/3 and 2/3). Moves up and the arrival at clean data stay whole.

    Args:
      schedule: the schedule that the grid was made from.
      grid: fields `(N+1,)`.
      stages: 2 or more.

    Returns:
      The grid with `stages - 1` nodes more for each step.

    Raises:
      ValueError: `stages` is not an integer of at least 2, the grid starts from zero signal, or its
        values are not known.
    """
    _nodes.check_count("stages", stages)
    if stages < 2:
        raise ValueError(f"stages must be at least 2, got {stages}")
    _nodes.check_schedule(schedule)
    nodes = _nodes.on_host(grid)
    log_snr = _nodes.log_snr_of(nodes)
    divided = np.flatnonzero((log_snr[1:] > log_snr[:-1]) & (nodes.sigma[1:] > 0))
    if np.any(np.isinf(log_snr[divided])):
        raise ValueError(
            "the first step starts from zero signal, where the log-SNR is infinite and has no "
            "middle: take a grid that starts from some signal, such as uniform_log_snr"
        )
    if not divided.size:
        return _nodes.join([nodes])
    start, stop = log_snr[divided], log_snr[divided + 1]
    parts = np.arange(1, stages) / stages
    inner = start[:, None] + (stop - start)[:, None] * parts
    between = _nodes.at_log_snr(schedule, inner.reshape(-1))
    return _inserted(nodes, np.repeat(divided, stages - 1), between)


def with_halves(schedule: Schedule, grid: Node, first: int = 3) -> Node:
    """Divides the first steps at the middle of their times: the start of PNDM.

    For `solvers.pndm()`, whose first three steps are of the Runge-Kutta kind (Liu et al. 2022,
    eq. 13).

    Args:
      schedule: the schedule that the grid was made from.
      grid: fields `(N+1,)`.
      first: how many steps to divide; they go down and do not arrive at clean data.

    Returns:
      The grid with `first` nodes more, fields `(N+1+first,)`.

    Raises:
      ValueError: `first` is not an integer from 1 to the number of such steps, or the grid's values
        are not known.
    """
    _nodes.check_schedule(schedule)
    nodes = _nodes.on_host(grid)
    ratio = _nodes.noise_to_signal(nodes)
    whole = np.append((ratio[1:] < ratio[:-1]) & (ratio[1:] > 0), False)
    _nodes.check_count(
        "first", first, int(np.argmin(whole)), "the number of steps between noisy nodes, "
    )
    t = nodes.t.astype(np.float64)
    between = _nodes.at_times(schedule, (t[:first] + t[1 : first + 1]) / 2)
    return _inserted(nodes, np.arange(first), between)


def _inserted(nodes: Node, after: np.ndarray, new: Node) -> Node:
    """Returns the grid with the new nodes, each after the node with the given number."""
    order = np.argsort(np.append(np.arange(nodes.sigma.size), after), kind="stable")
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), nodes, new)
    return _nodes.join([both[order]])


def _check_goes_down(grid: Node, name: str) -> Node:
    nodes = _nodes.on_host(grid)
    if np.any(np.diff(_nodes.noise_to_signal(nodes)) >= 0):
        raise ValueError(f"{name} needs a grid that only goes down: apply it before others")
    return nodes
