"""Stochastic exponential integrators: SDE-DPM-Solver++ (Lu et al. 2022b, section 4)."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Info, Node, Solver
from jaxdiff.solvers import _steps
from jaxdiff.solvers._steps import MultistepState, half_log_snr


def sde_dpm_solver_pp(order: int = 2, average: Literal["midpoint", "exact"] = "midpoint") -> Solver:
    """Solves the reverse SDE with a polynomial in lambda through the predicted clean data.

    With r = alpha sigma' / (alpha' sigma) and the average x0 over the step,

        x' = r sigma'/sigma x + (alpha' - r alpha sigma'/sigma) x0 + sigma' sqrt(1 - r²) z

    (eq. 18 there; order 1 is `ddpm("small")`). The noise is read off one Brownian path per example,
    at the nodes: sigma' (z(lambda') - r z(lambda)). So a grid of half the steps follows the same
    path, and samples of more and more steps converge.

    Args:
      order: 1 or 2; 2 is "DPM++ 2M SDE".
      average: "midpoint" or "exact", see `dpm_solver`.

    Returns:
      The solver, one evaluation a step. On arrival at a clean node it takes a step of order 1.

    Raises:
      ValueError: an option is none of the above.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if average not in ("midpoint", "exact"):
        raise ValueError(f'average must be "midpoint" or "exact", got {average!r}')

    def init(x: Array, node: Node) -> MultistepState:
        return _steps.no_past(x, half_log_snr(node), order)

    def step(
        keys: Array, denoiser: Denoiser, state: MultistepState, now: Node, next: Node
    ) -> tuple[MultistepState, Info]:
        x = state.x
        prediction = denoiser(x, now)
        begin, end = half_log_snr(now), half_log_snr(next)
        values, places = (prediction.x0, *state.values), (begin, *state.places)
        used = jnp.where(next.sigma > 0, state.count + 1, 1)
        tilt = 2 * (end - begin)  # e^(2 lambda) takes the place of e^lambda
        tilts = [tilt, 0.0 if average == "midpoint" else tilt]
        mean = _steps.average(values, places, begin, end, tilts, used)

        shape, dtype = x.shape[1:], x.dtype
        before, after = (
            rng.ornstein_uhlenbeck(keys, place, shape, dtype) for place in (begin, end)
        )
        now, next = now.over(x), next.over(x)
        ratio = now.alpha * next.sigma / (next.alpha * now.sigma)
        kept = ratio * next.sigma / now.sigma
        x = kept * x + (next.alpha - kept * now.alpha) * mean
        x = x + next.sigma * (after - ratio * before)
        state = _steps.remembered(state, x, values, places)
        return state, Info(prediction.x0, prediction.evaluations)

    return Solver(init, step, one_path=True)
