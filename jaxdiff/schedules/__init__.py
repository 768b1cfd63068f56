"""Noise schedules: how fast the data turns into noise, in steps or continuously."""

from jaxdiff.schedules.discrete import (
    NoiseSchedule,
    cosine,
    exponential,
    from_alphas_bar,
    from_betas,
    linear,
    quadratic,
    scaled_linear,
    sigmoid,
    take,
)

__all__ = [
    "NoiseSchedule",
    "cosine",
    "exponential",
    "from_alphas_bar",
    "from_betas",
    "linear",
    "quadratic",
    "scaled_linear",
    "sigmoid",
    "take",
]
