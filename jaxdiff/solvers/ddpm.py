"""Ancestral sampling (Ho et al. 2020), on any grid."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Info, Node, Solver, SolverState
from jaxdiff.process import q_posterior, step_variance


def ddpm(variance: Literal["small", "large"] = "small") -> Solver:
    """Draws from q(x_s | x_t, x0) with the predicted x0 in place of the true one.

    x_s = mean + std z, mean and small variance as in `process.q_posterior`, whatever the stride of
    the grid (Ho et al. 2020, algorithm 2, eq. 7). No noise is added on arrival at a clean node.

    Args:
      variance: "small" for the posterior's own, which is right for data that are one point;
        "large" for v, beta_t at consecutive indices, which is right for standard normal data
        (section 3.2 there).

    Returns:
      The solver, one evaluation a step.

    Raises:
      ValueError: `variance` is neither.
    """
    if variance not in ("small", "large"):
        raise ValueError(f'variance must be "small" or "large", got {variance!r}')

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        x0 = denoiser(state.x, now).x0
        mean, var = q_posterior(x0, state.x, now, next)
        if variance == "large":
            large = step_variance(now.over(mean), next.over(mean))
            var = jnp.where(next.over(mean).sigma > 0, large, 0)
        z = rng.normal(keys, mean.shape[1:], mean.dtype)
        return SolverState(mean + jnp.sqrt(var) * z), Info(x0, jnp.int32(1))

    return Solver(lambda x, node: SolverState(x), step)
