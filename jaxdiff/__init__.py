"""jaxdiff: diffusion models in JAX, as small pure functions over pytrees.

Importing the package brings the mathematics, which needs JAX only; `jaxdiff.models`,
`jaxdiff.training`, `jaxdiff.data`, `jaxdiff.evaluation` and `jaxdiff.viz` are imported by name.
"""

from jaxdiff import (
    base,
    columns,
    denoisers,
    editing,
    grids,
    guidance,
    likelihood,
    losses,
    predictions,
    process,
    rng,
    sampling,
    schedules,
    solvers,
    timesteps,
    validation,
)
from jaxdiff.base import Node, Prediction
from jaxdiff.sampling import sample

__version__ = "0.1.0"

__all__ = [
    "Node",
    "Prediction",
    "base",
    "columns",
    "denoisers",
    "editing",
    "grids",
    "guidance",
    "likelihood",
    "losses",
    "predictions",
    "process",
    "rng",
    "sample",
    "sampling",
    "schedules",
    "solvers",
    "timesteps",
    "validation",
]
