"""Exponential integrators: DPM-Solver, DPM-Solver++ and DEIS, multistep and singlestep.

All of them average x0 or eps over the step as in eqs. (3)-(5) of `jaxdiff.solvers._steps`; they
differ in which of the two, and in which values the polynomial goes through: those of the last steps
(multistep), or those of the stages of one step (singlestep).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, Denoiser, Info, Node, Solver
from jaxdiff.solvers import _steps
from jaxdiff.solvers._steps import Frame, MultistepState, half_log_snr, over

Kind = Literal["multistep", "singlestep"]
Average = Literal["midpoint", "exact"]


def dpm_solver(order: int = 2, kind: Kind = "singlestep", average: Average = "exact") -> Solver:
    """DPM-Solver (Lu et al. 2022): a polynomial in lambda through the predicted noise.

    Args:
      order: 1, 2 or 3; 1 is DDIM.
      kind: "multistep" takes the values of the last steps. "singlestep" takes those of the stages
        of one step: `order` intervals of the grid make one step, and its inner nodes are the
        stages: place them with `grids.with_midpoints`, where the paper has them (order 3 needs
        them at thirds of lambda).
      average: "exact" integrates the polynomial exactly; "midpoint" averages the line of order 2
        without the exponential factor, as the published multistep solvers of order 2 do.

    Returns:
      The solver, one evaluation for each interval of the grid. On arrival at a clean node, where
      lambda is infinite, it takes a step of order 1.

    Raises:
      ValueError: an option is none of the above.
    """
    return _exponential("eps", order, kind, average)


def dpm_solver_pp(
    order: int = 2, kind: Kind = "multistep", average: Average = "midpoint"
) -> Solver:
    """DPM-Solver++ (Lu et al. 2022b): a polynomial in lambda through the predicted clean data.

    The default is the usual "DPM++ 2M". It stays stable under guidance, where `dpm_solver` does
    not.

    Args:
      order: 1, 2 or 3; 1 is DDIM.
      kind: "multistep" or "singlestep", see `dpm_solver`.
      average: "midpoint" or "exact", see `dpm_solver`; of no account for orders 1 and 3.

    Returns:
      The solver, one evaluation for each interval of the grid. On arrival at a clean node it takes
      a step of order 1.

    Raises:
      ValueError: an option is none of the above.
    """
    return _exponential("x0", order, kind, average)


def deis(order: int = 3) -> Solver:
    """DEIS (Zhang & Chen 2023) with polynomials of the predicted noise in log(sigma/alpha).

    The multistep `dpm_solver` of any order, integrated exactly; in the paper's frame of rho =
    sigma/alpha, with extrapolation in log rho.

    Args:
      order: 1 to 4; 1 is DDIM.

    Returns:
      The solver, one evaluation a step. On arrival at a clean node it takes a step of order 1.

    Raises:
      ValueError: `order` is none of the above.
    """
    _check_order(order, 4)
    return _multistep("eps", order, "exact")


class SinglestepState(NamedTuple):
    """The state of a singlestep solver.

    Attributes:
      x: the samples, `(B, *spatial, C)`.
      start_x: the samples at the begin of the step, shaped as `x`.
      start: the node there.
      values: the predictions of the stages, newest first, each shaped as `x`.
      places: lambda at the stages, each shaped as a node's field.
      stage: the number of the stage, int32, shaped as a node's field.
    """

    x: Array
    start_x: Array
    start: Node
    values: tuple[Array, ...]
    places: tuple[Array, ...]
    stage: Array


def _exponential(frame: Frame, order: int, kind: Kind, average: Average) -> Solver:
    _check_order(order, 3)
    if average not in ("midpoint", "exact"):
        raise ValueError(f'average must be "midpoint" or "exact", got {average!r}')
    if kind == "multistep":
        return _multistep(frame, order, average)
    if kind == "singlestep":
        return _singlestep(frame, order, average)
    raise ValueError(f'kind must be "multistep" or "singlestep", got {kind!r}')


def _check_order(order: int, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"order must be an integer from 1 to {most}, got {order!r}")


def _tilts(frame: Frame, width: Array, average: Average) -> list[Array | float]:
    tilt = width if frame == "x0" else -width
    return [tilt, 0.0 if average == "midpoint" else tilt, tilt, tilt]


def _multistep(frame: Frame, order: int, average: Average) -> Solver:
    def init(x: Array, node: Node) -> MultistepState:
        return _steps.no_past(x, half_log_snr(node), order)

    def step(
        keys: Array, denoiser: Denoiser, state: MultistepState, now: Node, next: Node
    ) -> tuple[MultistepState, Info]:
        x = state.x
        prediction = denoiser(x, now)
        begin, end = half_log_snr(now), half_log_snr(next)
        values = (_steps.read(prediction, x, now, frame), *state.values)
        places = (begin, *state.places)
        used = jnp.where(next.sigma > 0, state.count + 1, 1)
        tilts = _tilts(frame, end - begin, average)
        mean = _steps.average(values, places, begin, end, tilts, used)
        x = _steps.move_by(x, prediction, mean, now, next, frame)
        state = _steps.remembered(state, x, values, places)
        return state, Info(prediction.x0, prediction.evaluations)

    return Solver(init, step)


def _singlestep(frame: Frame, order: int, average: Average) -> Solver:
    def init(x: Array, node: Node) -> SinglestepState:
        past = range(order - 1)
        place = half_log_snr(node)
        return SinglestepState(
            x,
            x,
            node,
            tuple(jnp.zeros_like(x) for _ in past),
            tuple(jnp.zeros_like(place) for _ in past),
            jnp.zeros_like(place, jnp.int32),
        )

    def step(
        keys: Array, denoiser: Denoiser, state: SinglestepState, now: Node, next: Node
    ) -> tuple[SinglestepState, Info]:
        x, stage = state.x, state.stage
        prediction = denoiser(x, now)
        values = (_steps.read(prediction, x, now, frame), *state.values)
        places = (half_log_snr(now), *state.places)

        # Without signal at its begin a step cannot be continued from there in terms of eps.
        first = (stage == 0) | ((state.start.alpha == 0) & (frame == "eps"))
        start = jax.tree.map(lambda a, b: jnp.where(first, a, b), now, state.start)
        start_x = jnp.where(over(first, x), x, state.start_x)
        stage = jnp.where(first, 0, stage)
        begin, end = half_log_snr(start), half_log_snr(next)
        tilts = _tilts(frame, end - begin, average)
        mean = _steps.average(values, places, begin, end, tilts, stage + 1)
        plain = _steps.move_by(x, prediction, values[0], now, next, frame)
        # The begin of a step of the first kind is `now`, from which `plain` is the same and safe.
        safe = Node(start.t, jnp.where(first, 1.0, start.alpha), start.sigma)
        refined = _steps.move(start_x, mean, safe, next, frame)
        x = jnp.where(over(first | (next.sigma == 0), x), plain, refined)
        state = SinglestepState(
            x, start_x, start, values[: order - 1], places[: order - 1], (stage + 1) % order
        )
        return state, Info(prediction.x0, prediction.evaluations)

    return Solver(init, step)
