"""Self-conditioning (Chen et al. 2023, "Analog bits")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxdiff.base import Array, Info, Node, Prediction, Solver


class SelfConditionedState(NamedTuple):
    """The state of a solver that hands its last prediction on.

    Attributes:
      x: the samples, `(B, *spatial, C)`.
      inner: the state of the solver within.
      x0: the clean data that the last step believed in, shaped as `x`; zeros before the first.
    """

    x: Array
    inner: Any
    x0: Array


def self_conditioned(solver: Solver) -> Solver:
    """Gives the denoiser, in each step, the clean data that the step before believed in.

    Args:
      solver: any solver.

    Returns:
      The solver for denoisers `(x, node, x0_prev) -> Prediction`, as
      `denoisers.from_network(..., self_condition=True)` makes them.
    """

    def init(x: Array, node: Node) -> SelfConditionedState:
        return SelfConditionedState(x, solver.init(x, node), jnp.zeros_like(x))

    def step(
        keys: Array,
        denoiser: Callable[[Array, Node, Array], Prediction],
        state: SelfConditionedState,
        now: Node,
        next: Node,
    ) -> tuple[SelfConditionedState, Info]:
        inner, info = solver.step(
            keys,
            lambda x, node: denoiser(x, node, state.x0),
            state.inner._replace(x=state.x),
            now,
            next,
        )
        return SelfConditionedState(inner.x, inner, info.x0), info

    return solver._replace(init=init, step=step)
