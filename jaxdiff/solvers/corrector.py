"""Predictor-corrector sampling (Song et al. 2021b, section 4.2)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Info, Node, Solver
from jaxdiff.predictions import eps_from_x0
from jaxdiff.solvers._steps import unless_clean


def predictor_corrector(predictor: Solver, num_steps: int = 1, snr: float = 0.16) -> Solver:
    """Follows each step of a solver by Langevin steps at the node it arrived at.

    x <- x + e score(x) + sqrt(2 e) z,    e = 2 (snr sigma)²,    score = -eps / sigma

    (algorithms 2 and 4 there). The published step size has |z| / |score| in place of sigma,
    averaged over the batch, which couples the samples; sigma is what that ratio is expected to be.
    At a clean node nothing is corrected.

    Args:
      predictor: the solver, one that needs no more of its past than x: a one-step solver.
      num_steps: Langevin steps after each of its steps.
      snr: the ratio of the score's and the noise's part in a step, positive.

    Returns:
      The solver, `num_steps` evaluations a step more than the predictor.

    Raises:
      ValueError: `num_steps` is less than 1 or `snr` not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not snr > 0:
        raise ValueError(f"snr must be positive, got {snr}")

    def step(
        keys: Array, denoiser: Denoiser, state: tuple, now: Node, next: Node
    ) -> tuple[tuple, Info]:
        state, info = predictor.step(keys, denoiser, state, now, next)
        there = next.over(state.x)

        def corrected() -> tuple[Array, Array | int]:
            x, evaluations = state.x, info.evaluations
            for k in range(num_steps):
                prediction = denoiser(x, next)
                eps = eps_from_x0(prediction.x0, x, next)
                own = rng.at_node(rng.stream(keys, rng.Stream.CORRECTOR, k), next)
                z = rng.normal(own, x.shape[1:], x.dtype)
                # In units of sigma the step is 2 snr².
                x = x + there.sigma * (2 * snr * z - 2 * snr**2 * eps)
                evaluations = evaluations + prediction.evaluations
            return x, evaluations

        x, evaluations = unless_clean(next, corrected, lambda: (state.x, info.evaluations), state.x)
        return state._replace(x=x), Info(info.x0, jnp.asarray(evaluations, jnp.int32))

    return Solver(predictor.init, step, one_path=predictor.one_path)
