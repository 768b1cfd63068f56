"""Denoising diffusion implicit models (Song, Meng & Ermon 2021)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Info, Node, Solver, SolverState
from jaxdiff.predictions import eps_from_x0
from jaxdiff.process import step_variance


def ddim(eta: float = 0.0) -> Solver:
    """Moves to the next node along the predicted noise, eta of it drawn afresh.

    x_s = alpha_s x0 + sqrt(sigma_s² - tau²) eps + tau z,  tau = eta sqrt(v) sigma_s / sigma_t
    (Song et al. 2021, eqs. 12, 16, with v as in `process.step_variance`).

    Args:
      eta: 0 for the deterministic solver, which draws nothing; 1 for `ddpm("small")`.

    Returns:
      The solver, one evaluation a step, of order 1 for eta = 0.

    Raises:
      ValueError: `eta` lies outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        x = state.x
        prediction = denoiser(x, now)
        x0 = prediction.x0
        eps = eps_from_x0(x0, x, now)
        info = Info(x0, prediction.evaluations)
        now, next = now.over(x), next.over(x)
        if eta == 0:
            return SolverState(next.alpha * x0 + next.sigma * eps), info
        # Of sigma_s², this share is fresh noise.
        share = eta**2 * step_variance(now, next) / now.sigma**2
        z = rng.normal(keys, x.shape[1:], x.dtype)
        noise = jnp.sqrt(jnp.maximum(1 - share, 0)) * eps + jnp.sqrt(share) * z
        return SolverState(next.alpha * x0 + next.sigma * noise), info

    return Solver(lambda x, node: SolverState(x), step)


def euler() -> Solver:
    """`ddim()` under the name it has in variance-exploding and flow models.

    Where alpha = 1 it is x' = x + (sigma' - sigma) (x - x0)/sigma (Karras et al. 2022;
    k-diffusion's `sample_euler`), for rectified flow x' = x + (t' - t) v (Liu et al. 2023).

    Returns:
      The solver, of order 1, one evaluation a step.
    """
    return ddim()


def euler_ancestral(eta: float = 1.0) -> Solver:
    """`ddim(eta)` under the name it has in variance-exploding models.

    An Euler step down to sqrt(sigma'² - tau²), then noise of standard deviation tau = eta sigma'
    sqrt(1 - sigma'²/sigma²) (k-diffusion's `sample_euler_ancestral`, Crowson 2022).

    Args:
      eta: the share of fresh noise, in [0, 1].

    Returns:
      The solver, one evaluation a step.

    Raises:
      ValueError: `eta` lies outside [0, 1].
    """
    return ddim(eta)
