"""Ancestral sampling (Ho et al. 2020), on any grid."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Info, Node, Solver, SolverState
from jaxdiff.process import Variance, check_variance, q_posterior, reverse_variance


def ddpm(variance: Variance = "small") -> Solver:
    """Draws from q(x_s | x_t, x0) with the predicted x0 in place of the true one.

    x_s = mean + std z, mean and small variance as in `process.q_posterior`, whatever the stride of
    the grid (Ho et al. 2020, algorithm 2, eq. 7). No noise is added on arrival at a clean node.

    Args:
      variance: "small" for the posterior's own, which is right for data that are one point;
        "large" for v, beta_t at consecutive indices, which is right for standard normal data
        (section 3.2 there); "learned" for what the denoiser says lies between the two (Nichol &
        Dhariwal 2021, eq. 15).

    Returns:
      The solver, one evaluation a step.

    Raises:
      ValueError: `variance` is none of these; in the step, it is "learned" and the denoiser says
        nothing of it.
    """
    check_variance(variance)

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        prediction = denoiser(state.x, now)
        mean, _ = q_posterior(prediction.x0, state.x, now, next)
        begin, end = now.over(mean), next.over(mean)
        var = reverse_variance(variance, begin, end, prediction.variance)
        var = jnp.where(end.sigma > 0, var, 0)
        z = rng.normal(keys, mean.shape[1:], mean.dtype)
        return SolverState(mean + jnp.sqrt(var) * z), Info(prediction.x0, prediction.evaluations)

    return Solver(lambda x, node: SolverState(x), step)
