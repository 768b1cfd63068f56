"""Multistep consistency sampling (Song et al. 2023)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Info, Node, Solver, SolverState


def consistency(sigma_min: float = 0.0) -> Solver:
    """Goes to the end of the trajectory, then back to the next node with fresh noise.

    x_s = alpha_s f + sqrt(sigma_s² - (alpha_s sigma_min)²) z,  f = f(x_t, t)
    (Song et al. 2023, algorithm 1), where the denoiser is a consistency function
    (`losses.consistency_denoiser`). f itself on arrival at a clean node; one step to there is
    one-step sampling.

    Args:
      sigma_min: the noise-to-signal ratio at which the trajectories end: what f has left.

    Returns:
      The solver, one evaluation a step.

    Raises:
      ValueError: `sigma_min` is negative.
    """
    if not sigma_min >= 0:
        raise ValueError(f"sigma_min must not be negative, got {sigma_min}")

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        x = state.x
        prediction = denoiser(x, now)
        next = next.over(x)
        left = next.alpha * sigma_min
        noise = jnp.sqrt(jnp.maximum((next.sigma - left) * (next.sigma + left), 0))
        z = rng.normal(keys, x.shape[1:], x.dtype)
        x = next.alpha * prediction.x0 + noise * z
        return SolverState(x), Info(prediction.x0, prediction.evaluations)

    return Solver(lambda x, node: SolverState(x), step)
