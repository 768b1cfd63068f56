"""Adaptive integration of a batch, each example with steps of its own, by diffrax (extra `ode`)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, PyTree

Velocity = Callable[[Array, PyTree], PyTree]
"""`(place (B,), state) -> d state / d place`: of a batch, each example at its own place."""


def load_diffrax(caller: str) -> ModuleType:
    """Returns diffrax.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(f'{caller} needs diffrax: pip install "jaxdiff[ode]"') from error
    return diffrax


def check_accuracy(rtol: float, atol: float, max_steps: int) -> None:
    """Checks what an adaptive solution is asked for.

    Raises:
      ValueError: a tolerance is not positive or `max_steps` less than 1.
    """
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol and atol must be positive, got {rtol} and {atol}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


def solve_each(
    diffrax: ModuleType,
    velocity: Velocity,
    begin: Array,
    end: Array,
    state: PyTree,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    reverse_mode: bool,
) -> tuple[PyTree, Array]:
    """Solves d state / d place = velocity for each example, by Tsit5 with a PID controller.

    An error is that of the worst leaf of the state: of each the root mean square, so that a scalar
    counts as much as an image.

    Args:
      diffrax: the library, `load_diffrax`.
      velocity: sees the whole batch, because a denoiser may hold a condition for each example.
      begin: where the examples are, `(B,)`.
      end: where they go, `(B,)`.
      state: arrays `(B, ...)`.
      rtol: the relative tolerance of each example.
      atol: the absolute tolerance of each example.
      max_steps: at most so many steps, accepted or not.
      reverse_mode: whether gradients may be taken backwards through the solution, which costs time.

    Returns:
      The state at `end`, NaN for an example that did not get there, and how often the velocity was
      asked for, int32 `(B,)`.
    """

    def norm(error: PyTree) -> Array:
        squares = [jnp.mean(leaf**2) for leaf in jax.tree.leaves(error)]
        worst = squares[0] if len(squares) == 1 else jnp.max(jnp.stack(squares))
        # No gradient flows through the root of an error of zero.
        return jnp.sqrt(jnp.where(worst > 0, worst, 1)) * (worst > 0)

    def solve(begin: Array, end: Array, state: PyTree) -> tuple[PyTree, Array]:
        """Solves for one example of the batch, which is mapped over."""

        def field(place: Array, state: PyTree, _: None) -> PyTree:
            whole = jax.lax.all_gather((place, state), "batch")
            own = jax.lax.axis_index("batch")
            return jax.tree.map(lambda leaf: leaf[own], velocity(*whole))

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            begin,
            end,
            (end - begin) / 20,
            state,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=norm),
            saveat=diffrax.SaveAt(t1=True),
            adjoint=diffrax.DirectAdjoint() if reverse_mode else diffrax.ForwardMode(),
            max_steps=max_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        state = jax.tree.map(lambda leaf: jnp.where(done, leaf[0], jnp.nan), solution.ys)
        # Tsit5 has seven stages, the last of which is the first of the next step.
        return state, 6 * solution.stats["num_steps"] + 1

    # Hidden from XLA, whose simplifier goes in circles (and says so) when it knows the ends.
    begin, end = jax.lax.optimization_barrier((begin, end))
    return jax.vmap(solve, axis_name="batch")(begin, end, state)
