"""Noise schedules: how fast the data turns into noise, in steps or continuously."""

from jaxdiff.schedules.closed_forms import (
    edm,
    laplace,
    rectified_flow,
    sub_vp,
    ve,
    vp_cosine,
    vp_linear,
    vp_sigmoid,
)
from jaxdiff.schedules.continuous import (
    ContinuousSchedule,
    straight_line,
    sub_variance,
    variance_exploding,
    variance_preserving,
)
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
    zero_terminal_snr,
)
from jaxdiff.schedules.learned import Learned, init_learned, learned
from jaxdiff.schedules.transforms import discretized, interpolated, shifted, truncated

__all__ = [
    "ContinuousSchedule",
    "Learned",
    "NoiseSchedule",
    "cosine",
    "discretized",
    "edm",
    "exponential",
    "from_alphas_bar",
    "from_betas",
    "init_learned",
    "interpolated",
    "laplace",
    "learned",
    "linear",
    "quadratic",
    "rectified_flow",
    "scaled_linear",
    "shifted",
    "sigmoid",
    "straight_line",
    "sub_variance",
    "sub_vp",
    "take",
    "truncated",
    "variance_exploding",
    "variance_preserving",
    "ve",
    "vp_cosine",
    "vp_linear",
    "vp_sigmoid",
    "zero_terminal_snr",
]
