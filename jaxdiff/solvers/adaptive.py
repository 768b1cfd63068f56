"""The probability flow solved adaptively, by diffrax (optional extra `ode`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, Denoiser, Info, Node, Schedule, Solver, SolverState
from jaxdiff.predictions import eps_from_x0
from jaxdiff.solvers._ode import check_accuracy, load_diffrax, solve_each
from jaxdiff.solvers._steps import move, unless_clean

# From less signal than this (alpha/sigma = e^-12) a step starts here: the difference is below what
# float32 resolves of x.
LEAST = -12.0


def probability_flow(
    schedule: Schedule, rtol: float = 1e-4, atol: float = 1e-4, max_steps: int = 4096
) -> Solver:
    """Solves the probability flow between two nodes to a given accuracy.

    dx/dl = dalpha/dl x0 + dsigma/dl eps over l = log(alpha/sigma) (Song et al. 2021b, eq. 13), by
    diffrax's Tsit5 with a PID controller. Each sample has steps and an error of its own: it does
    not depend on its neighbours. The grid says where to stop on the way: two nodes and the clean
    one suffice, `grids.trailing(schedule, 2)`. On arrival at the clean node it takes an Euler step.

    Args:
      schedule: the schedule, which says what lies between the nodes.
      rtol: the relative tolerance of each sample.
      atol: the absolute tolerance of each sample.
      max_steps: at most so many steps, accepted or not, from node to node.

    Returns:
      The solver; the evaluations reported are those of the sample that needed most.

    Raises:
      ImportError: diffrax is not installed.
      ValueError: a tolerance is not positive or `max_steps` less than 1.
    """
    diffrax = load_diffrax("solvers.probability_flow")
    check_accuracy(rtol, atol, max_steps)

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        x = state.x
        first = denoiser(x, now)

        def velocity(place: Array, x: Array) -> Array:
            """Returns dx/dl of a batch, each example at its own place l, `(B,)`."""

            def levels(place: Array) -> tuple[Array, Array]:
                return schedule.levels(2 * place)

            (alpha, sigma), slopes = jax.jvp(levels, (place,), (jnp.ones_like(place),))
            node = Node(schedule.time(2 * place), alpha, sigma)
            x0 = denoiser(x, node).x0
            slope = Node(node.t, *slopes).over(x)
            return slope.alpha * x0 + slope.sigma * eps_from_x0(x0, x, node)

        def refined() -> tuple[Array, Array]:
            begin, end = (
                jnp.broadcast_to(jnp.maximum(node.log_snr / 2, LEAST), x.shape[:1])
                for node in (now, next)
            )
            # A sample that did not get there is not a sample, but NaN.
            solved, evaluations = solve_each(
                diffrax, velocity, begin, end, x,
                rtol=rtol, atol=atol, max_steps=max_steps, reverse_mode=True,
            )  # fmt: skip
            return solved, jnp.max(evaluations) * first.evaluations

        def plain() -> tuple[Array, Array | int]:
            return move(x, first.x0, now, next, "x0"), first.evaluations

        x, evaluations = unless_clean(next, refined, plain, x)
        return SolverState(x), Info(first.x0, evaluations)

    return Solver(lambda x, node: SolverState(x), step)
