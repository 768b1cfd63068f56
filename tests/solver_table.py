"""The table of all solvers, which drives the generic tests, and the data they are tested on."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff import denoisers, schedules, solvers
from jaxdiff.base import Node, Solver

SCHEDULE = schedules.linear()
WEIGHTS, MEANS, STDS = [0.5, 0.3, 0.2], [0.0, 1.0, -0.6], [0.2, 0.1, 0.3]
MIXTURE = denoisers.gaussian_mixture(WEIGHTS, np.array(MEANS)[:, None], STDS)


class Case(NamedTuple):
    """A solver and what is known of it.

    Attributes:
      solver: the solver.
      order: of convergence, of a deterministic one.
      stages: how many intervals of the grid make one step.
      startup: how many first steps are of lower order.
      share: of a stochastic one of Song et al.'s family, its noise as a share of the posterior's
        standard deviation, or "large".
      evaluations: how many for N intervals that end at the clean node.
      halves: whether the first six intervals are halves of three.
    """

    solver: Solver
    order: int | None = None
    stages: int = 1
    startup: int = 0
    share: float | str | None = None
    evaluations: Callable[[int], int] = lambda n: n
    halves: bool = False


SOLVERS = {
    "ddpm": Case(solvers.ddpm(), share=1.0),
    "ddpm_large": Case(solvers.ddpm("large"), share="large"),
    "ddim": Case(solvers.ddim(), 1, share=0.0),
    "ddim_0.5": Case(solvers.ddim(0.5), share=0.5),
    "ddim_1": Case(solvers.ddim(1.0), share=1.0),
    "euler": Case(solvers.euler(), 1, share=0.0),
    "euler_ancestral": Case(solvers.euler_ancestral(), share=1.0),
    "heun": Case(solvers.heun(), 2, evaluations=lambda n: 2 * n - 1),
    "dpm_solver_1": Case(solvers.dpm_solver(1), 1, share=0.0),
    "dpm_solver_2": Case(solvers.dpm_solver(2), 2, stages=2),
    "dpm_solver_3": Case(solvers.dpm_solver(3), 3, stages=3),
    "dpm_solver_2m": Case(solvers.dpm_solver(2, "multistep", "midpoint"), 2, startup=1),
    "dpm_solver_3m": Case(solvers.dpm_solver(3, "multistep"), 3, startup=2),
    "dpm_solver_pp_2s": Case(solvers.dpm_solver_pp(2, "singlestep"), 2, stages=2),
    "dpm_solver_pp_3s": Case(solvers.dpm_solver_pp(3, "singlestep"), 3, stages=3),
    "dpm_solver_pp_1": Case(solvers.dpm_solver_pp(1), 1, share=0.0),
    "dpm_solver_pp_2m": Case(solvers.dpm_solver_pp(2), 2, startup=1),
    "dpm_solver_pp_2m_exact": Case(solvers.dpm_solver_pp(2, average="exact"), 2, startup=1),
    "dpm_solver_pp_3m": Case(solvers.dpm_solver_pp(3), 3, startup=2),
    "deis_2": Case(solvers.deis(2), 2, startup=1),
    "deis_3": Case(solvers.deis(3), 3, startup=2),
    "deis_4": Case(solvers.deis(4), 4, startup=3),
    "unipc_1": Case(solvers.unipc(1), 2, startup=1),
    "unipc_2": Case(solvers.unipc(2), 3, startup=2),
    "unipc_2_bh1": Case(solvers.unipc(2, "bh1"), 3, startup=2),
    "unipc_3": Case(solvers.unipc(3), 4, startup=3),
    "lms_2": Case(solvers.lms(2), 2, startup=1),
    "lms_4": Case(solvers.lms(4), 4, startup=3),
    "plms": Case(solvers.plms(), 2, evaluations=lambda n: n + 1),
    "pndm": Case(solvers.pndm(), 2, evaluations=lambda n: n + min(n, 6), halves=True),
    "sde_dpm_solver_pp_1": Case(solvers.sde_dpm_solver_pp(1), share=1.0),
    "sde_dpm_solver_pp_2m": Case(solvers.sde_dpm_solver_pp(2)),
    "predictor_corrector": Case(
        solvers.predictor_corrector(solvers.ddpm()), evaluations=lambda n: 2 * n - 1
    ),
    "corrected_ddim": Case(
        solvers.predictor_corrector(solvers.ddim(), 2), evaluations=lambda n: 3 * n - 2
    ),
    "probability_flow": Case(solvers.probability_flow(SCHEDULE), evaluations=None),
}


def vp_grid(half_log_snr):
    """The variance-preserving grid at the given values of log(alpha/sigma)."""
    lam = np.asarray(half_log_snr)
    alpha, sigma = (1 / np.sqrt(1 + np.exp(sign * 2 * lam)) for sign in (-1, 1))
    return Node(*(jnp.asarray(field, float) for field in (lam, alpha, sigma)))
