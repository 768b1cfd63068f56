"""Linear multistep methods in the predicted noise: LMS, PLMS and PNDM.

In terms of x/alpha and rho = sigma/alpha the probability flow is d(x/alpha) = eps d rho. All three
average eps over a step, with a polynomial through its last values (eq. 5 of
`jaxdiff.solvers._steps`, constant p): in rho (LMS), or in the number of the step (PLMS, PNDM).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, Denoiser, Info, Node, Prediction, Solver
from jaxdiff.solvers import _steps
from jaxdiff.solvers._steps import MultistepState, noise_to_signal

# Adams-Bashforth: weights of the last 1, 2, 3, 4 values at equal distances, newest first.
_ADAMS = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def lms(order: int = 4) -> Solver:
    """Linear multistep in rho = sigma/alpha, for any distances (k-diffusion, Crowson 2022).

    Adams-Bashforth whose coefficients are integrals of the Lagrange polynomials over the step.

    Args:
      order: 1 to 4; 1 is DDIM.

    Returns:
      The solver, one evaluation a step.

    Raises:
      ValueError: `order` is none of the above.
    """
    if order not in range(1, 5):
        raise ValueError(f"order must be an integer from 1 to 4, got {order!r}")

    def init(x: Array, node: Node) -> MultistepState:
        return _steps.no_past(x, noise_to_signal(node), order)

    def step(
        keys: Array, denoiser: Denoiser, state: MultistepState, now: Node, next: Node
    ) -> tuple[MultistepState, Info]:
        x = state.x
        prediction = denoiser(x, now)
        begin, end = noise_to_signal(now), noise_to_signal(next)
        values = (_steps.read(prediction, x, now, "eps"), *state.values)
        places = (begin, *state.places)
        mean = _steps.average(values, places, begin, end, [0.0] * order, state.count + 1)
        x = _steps.move_by(x, prediction, mean, now, next, "eps")
        state = _steps.remembered(state, x, values, places)
        return state, Info(prediction.x0, prediction.evaluations)

    return Solver(init, step)


class LinearState(NamedTuple):
    """The state of `plms` and `pndm`.

    Attributes:
      x: the samples, `(B, *spatial, C)`.
      values: the predicted noise of the last three steps, newest first, each shaped as `x`.
      count: how many intervals of the grid have been walked, int32 `()`.
      start_x: the samples at the begin of the Runge-Kutta step, shaped as `x`.
      start: the node there.
      total: the weighted sum of the predicted noise of its stages so far, shaped as `x`.
    """

    x: Array
    values: tuple[Array, ...]
    count: Array
    start_x: Array
    start: Node
    total: Array


def plms() -> Solver:
    """Pseudo linear multistep (Liu et al. 2022), started by a pseudo Heun step.

    x' = DDIM's move by a combination of the last four predictions of the noise (eqs. 11, 12 there):
    PNDM as latent diffusion and diffusers (`skip_prk_steps`) use it, on grids of equal strides.

    Returns:
      The solver, of order 2 (the combination of the noise is of order 4, the move that it is put
      into is not), one evaluation a step, two in the first.
    """

    def start(
        denoiser: Denoiser, state: LinearState, prediction: Prediction, now: Node, next: Node
    ) -> tuple[Array, Array | int]:
        eps = _steps.read(prediction, state.x, now, "eps")
        euler = _steps.move_by(state.x, prediction, eps, now, next, "eps")
        second = denoiser(euler, next)
        mean = (eps + _steps.read(second, euler, next, "eps")) / 2
        x = _steps.move_by(state.x, prediction, mean, now, next, "eps")
        # The clean node has no noise to predict.
        x = jnp.where(next.over(x).sigma > 0, x, euler)
        return x, second.evaluations

    def step(
        keys: Array, denoiser: Denoiser, state: LinearState, now: Node, next: Node
    ) -> tuple[LinearState, Info]:
        prediction = denoiser(state.x, now)
        eps = _steps.read(prediction, state.x, now, "eps")
        values = (eps, *state.values)

        def first() -> tuple[Array, Array]:
            x, more = start(denoiser, state, prediction, now, next)
            return x, jnp.asarray(prediction.evaluations + more, jnp.int32)

        def later() -> tuple[Array, Array]:
            mean = _steps.weighted_sum(jnp.array(_ADAMS, eps.dtype)[state.count], values)
            x = _steps.move_by(state.x, prediction, mean, now, next, "eps")
            return x, jnp.asarray(prediction.evaluations, jnp.int32)

        x, evaluations = jax.lax.cond(state.count == 0, first, later)
        count = jnp.minimum(state.count + 1, 3)
        state = state._replace(x=x, values=values[:3], count=count)
        return state, Info(prediction.x0, evaluations)

    return Solver(_linear_init, step)


def pndm() -> Solver:
    """Pseudo numerical method with its pseudo Runge-Kutta start (Liu et al. 2022, F-PNDM).

    The first three steps are pseudo Runge-Kutta (eq. 13 there), which needs the nodes at half of
    them: the grid's first six intervals are these halves (`grids.with_halves`). The rest is
    `plms`.

    Returns:
      The solver, of order 2, four evaluations in each of the first three steps, then one a step.
    """

    def run(denoiser: Denoiser, x: Array, node: Node) -> tuple[Prediction, Array]:
        prediction = denoiser(x, node)
        return prediction, _steps.read(prediction, x, node, "eps")

    def first_half(
        denoiser: Denoiser, state: LinearState, now: Node, next: Node
    ) -> tuple[LinearState, Array, Array]:
        x = state.x
        prediction, first = run(denoiser, x, now)
        guess = _steps.move_by(x, prediction, first, now, next, "eps")
        again, second = run(denoiser, guess, next)
        # The clean node has no noise to predict.
        second = jnp.where(next.over(second).sigma > 0, second, first)
        after = _steps.move_by(x, prediction, second, now, next, "eps")
        values = (first, *state.values[:2])
        state = state._replace(
            x=after, values=values, start_x=x, start=now, total=first + 2 * second
        )
        return (
            state,
            prediction.x0,
            jnp.asarray(prediction.evaluations + again.evaluations, jnp.int32),
        )

    def second_half(
        denoiser: Denoiser, state: LinearState, now: Node, next: Node
    ) -> tuple[LinearState, Array, Array]:
        prediction, third = run(denoiser, state.x, now)
        guess = _steps.move(state.start_x, third, state.start, next, "eps")
        last, fourth = run(denoiser, guess, next)
        mean = (state.total + 2 * third + fourth) / 6
        # Without a fourth stage, the midpoint rule remains.
        mean = jnp.where(next.over(mean).sigma > 0, mean, third)
        after = _steps.move(state.start_x, mean, state.start, next, "eps")
        evaluations = jnp.asarray(prediction.evaluations + last.evaluations, jnp.int32)
        return state._replace(x=after), prediction.x0, evaluations

    def later(
        denoiser: Denoiser, state: LinearState, now: Node, next: Node
    ) -> tuple[LinearState, Array, Array]:
        prediction, eps = run(denoiser, state.x, now)
        values = (eps, *state.values)
        mean = _steps.weighted_sum(jnp.array(_ADAMS[3], eps.dtype), values)
        after = _steps.move_by(state.x, prediction, mean, now, next, "eps")
        evaluations = jnp.asarray(prediction.evaluations, jnp.int32)
        return state._replace(x=after, values=values[:3]), prediction.x0, evaluations

    def step(
        keys: Array, denoiser: Denoiser, state: LinearState, now: Node, next: Node
    ) -> tuple[LinearState, Info]:
        phase = jnp.where(state.count < 6, state.count % 2, 2)
        state, x0, evaluations = jax.lax.switch(
            phase,
            [
                lambda part=part: part(denoiser, state, now, next)
                for part in (first_half, second_half, later)
            ],
        )
        return state._replace(count=jnp.minimum(state.count + 1, 6)), Info(x0, evaluations)

    return Solver(_linear_init, step)


def _linear_init(x: Array, node: Node) -> LinearState:
    zero = jnp.zeros_like(x)
    return LinearState(x, (zero, zero, zero), jnp.int32(0), x, node, zero)
