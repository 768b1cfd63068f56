"""Heun's method, EDM's deterministic sampler (Karras et al. 2022)."""

from __future__ import annotations

from jaxdiff.base import Array, Denoiser, Info, Node, Solver, SolverState
from jaxdiff.predictions import eps_from_x0
from jaxdiff.solvers._steps import unless_clean


def heun() -> Solver:
    """A trapezoid: an Euler step, then the mean of the predictions at its two ends.

    x' = x + (alpha' - alpha) (x0 + x0')/2 + (sigma' - sigma) (eps + eps')/2

    (algorithm 1 of Karras et al. 2022 where alpha = 1; algorithm 2 on a grid from `grids.churn`).
    On arrival at a clean node, which has no noise to predict, it is the Euler step.

    Returns:
      The solver, of order 2, two evaluations a step, one on arrival at a clean node.
    """

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        x = state.x
        first = denoiser(x, now)
        eps = eps_from_x0(first.x0, x, now)
        end = next.over(x)
        euler = end.alpha * first.x0 + end.sigma * eps

        def refined() -> tuple[Array, Array | int]:
            second = denoiser(euler, next)
            x0 = (first.x0 + second.x0) / 2
            noise = (eps + eps_from_x0(second.x0, euler, next)) / 2
            begin = now.over(x)
            better = x + (end.alpha - begin.alpha) * x0 + (end.sigma - begin.sigma) * noise
            return better, first.evaluations + second.evaluations

        x, evaluations = unless_clean(next, refined, lambda: (euler, first.evaluations), x)
        return SolverState(x), Info(first.x0, evaluations)

    return Solver(lambda x, node: SolverState(x), step)
