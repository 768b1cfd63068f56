"""Solvers: ways from noise to data, each a pair `(init, step)`; see `jaxdiff.base.Solver`."""

from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.ddpm import ddpm

__all__ = ["ddim", "ddpm"]
