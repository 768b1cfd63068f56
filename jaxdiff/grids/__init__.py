"""Grids: which points of the process a sampler visits.

A grid is one `Node` with `(N+1,)` fields, from noise to data; its last point is clean data
(alpha = 1, sigma = 0, t = -1 for discrete schedules and 0 for continuous ones) unless asked
otherwise. There are N noisy nodes in spacings by time (`jaxdiff.grids.by_time`) and by noise level
(`jaxdiff.grids.by_noise`), and there are grids made of grids: ones that go up again, and ones with
nodes between the nodes (`jaxdiff.grids.derived`).

Example:
  >>> from jaxdiff import schedules
  >>> schedule = schedules.linear()
  >>> trailing(schedule, 5).t.tolist()
  [999, 799, 599, 399, 199, -1]
  >>> resample(trailing(schedule, 5), jump_length=2, num_resamples=2).t.tolist()
  [999, 799, 599, 999, 799, 599, 399, 199, 599, 399, 199, -1]
"""

from jaxdiff.grids.by_noise import exponential, from_sigmas, karras, uniform_log_snr
from jaxdiff.grids.by_time import beta, from_timesteps, leading, linspace, quadratic, trailing
from jaxdiff.grids.derived import churn, resample, restart, with_halves, with_midpoints

__all__ = [
    "beta",
    "churn",
    "exponential",
    "from_sigmas",
    "from_timesteps",
    "karras",
    "leading",
    "linspace",
    "quadratic",
    "resample",
    "restart",
    "trailing",
    "uniform_log_snr",
    "with_halves",
    "with_midpoints",
]
