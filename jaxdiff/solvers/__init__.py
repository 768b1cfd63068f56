"""Solvers: ways from noise to data, each a pair `(init, step)`; see `jaxdiff.base.Solver`."""

from jaxdiff.solvers.adaptive import probability_flow
from jaxdiff.solvers.consistency import consistency
from jaxdiff.solvers.corrector import predictor_corrector
from jaxdiff.solvers.ddim import ddim, euler, euler_ancestral
from jaxdiff.solvers.ddpm import ddpm
from jaxdiff.solvers.exponential import deis, dpm_solver, dpm_solver_pp
from jaxdiff.solvers.heun import heun
from jaxdiff.solvers.linear import lms, plms, pndm
from jaxdiff.solvers.sde import sde_dpm_solver_pp
from jaxdiff.solvers.self_conditioned import self_conditioned
from jaxdiff.solvers.unipc import unipc

__all__ = [
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpm_solver_pp",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "plms",
    "pndm",
    "predictor_corrector",
    "probability_flow",
    "sde_dpm_solver_pp",
    "self_conditioned",
    "unipc",
]
