"""Validation that does not wobble: the loss of held-out data at fixed noise levels and fixed noise.

For each example i and each point j of a grid of nodes, x = alpha_j x0_i + sigma_j eps_ij with noise
at the address (seed, i, j), the error of the clean data is the mean over the coordinates that count

    e_ij = mean |x0_hat(x) - x0_i|²                                                        (1)

which is worth an error of the output of any parameterization (`jaxdiff.predictions`, eq. 3): of
eps SNR e, of v ((alpha² + sigma²) / sigma)² e. The noise is the same bit for bit in every run,
whatever the batch size and the number of devices, the sum over the coordinates is taken in one
order, and the means over the examples in float64 on the host: two evaluations of one model differ
by what the network itself rounds differently, and two models by the models.

Example:
  >>> from jaxdiff import denoisers, predictions, schedules
  >>> exact, schedule = denoisers.gaussian([0.0, 0.0], 0.5), schedules.linear()
  >>> x0, points = 0.5 * jax.random.normal(jax.random.key(0), (500, 2)), grid(schedule, 10)
  >>> e = jax.jit(lambda x0: errors(jax.random.key(1), exact.denoiser, x0, points))(x0)
  >>> found = summarize(e, points, predictions.eps)
  >>> e.shape, found.eps.mean.shape, f"{found.weighted.mean:.1f}"
  ((10, 500), (10,), '0.2')
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxdiff import losses, predictions, rng
from jaxdiff._checks import check_float
from jaxdiff.base import Array, Denoiser, Node, Schedule
from jaxdiff.losses._masks import fill_masked, spread_mask
from jaxdiff.predictions import Parameterization
from jaxdiff.process import diffuse, uniform_index


class Estimate(NamedTuple):
    """Means over the examples, float64.

    Attributes:
      mean: `(N,)` for each point of the grid, or `()`.
      error: the standard error of `mean` over the examples; NaN for one example.
    """

    mean: np.ndarray
    error: np.ndarray


class Summary(NamedTuple):
    """The losses of held-out data.

    Attributes:
      log_snr: of the points, float64 `(N,)`.
      x0: the mean squared error of the clean data, eq. (1), at each point.
      eps: that of the noise.
      v: that of v.
      weighted: the loss of training: the mean over the points of the weighted errors of the output.
    """

    log_snr: np.ndarray
    x0: Estimate
    eps: Estimate
    v: Estimate
    weighted: Estimate


def grid(schedule: Schedule, num_points: int = 16) -> Node:
    """Returns the points: times in the middle of equal shares of the schedule's.

    t = (j + 1/2) / N, for a discrete schedule the index floor(t T): the mean over the points is
    that of uniform times, as most training draws them. Other nodes serve as well, a `Node` with
    fields `(N,)`.

    Args:
      schedule: the schedule.
      num_points: N, for a discrete schedule at most its steps.

    Raises:
      ValueError: there is no point, or more of them than there are steps.
    """
    most = schedule.num_steps
    if num_points < 1 or (most is not None and num_points > most):
        upper = "" if most is None else f" and at most {most}, the schedule's steps"
        raise ValueError(f"num_points must be at least 1{upper}, got {num_points}")
    u = jnp.asarray((np.arange(num_points) + 0.5) / num_points, jnp.float32)
    return schedule.at(u if most is None else uniform_index(u, most))


def errors(
    key: Array,
    denoiser: Denoiser,
    x0: Array,
    points: Node,
    *,
    index: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Returns the errors of a batch, eq. (1): N evaluations of the denoiser, in one scan.

    Args:
      key: one typed key, the seed's.
      denoiser: the denoiser; of a conditional model it holds this batch's conditions.
      x0: clean data `(B, *spatial, C)`.
      points: the nodes, fields `(N,)`, sigma > 0: `grid(schedule)`.
      index: int32 `(B,)`, the examples' numbers in the data set, 0 .. B-1 if not given. The noise
        of an example depends on `key`, its number and the point's place in the grid alone.
      mask: 1 where a coordinate counts, broadcasts to `x0`; None for all.

    Returns:
      float32 `(N, B)`: the squared error of x0, the mean over the coordinates that count, 0 for an
      example without any.

    Raises:
      TypeError: `x0` is not floating, or `key` not a typed key.
      ValueError: the points are not `(N,)`, or the mask does not fit.
    """
    if jnp.ndim(points.alpha) != 1:
        raise ValueError(
            f"points must be a Node with fields (N,), got {jnp.shape(points.alpha)}: take grid(...)"
        )
    x0 = fill_masked(check_float("x0", x0), mask)
    counts = spread_mask(jnp.ones((), bool) if mask is None else jnp.asarray(mask) > 0, x0)
    size = jnp.maximum(jnp.sum(counts, axis=tuple(range(1, x0.ndim))), 1)
    keys = rng.per_example(key, jnp.arange(x0.shape[0]) if index is None else index)

    def error(_: None, point: tuple[Array, Node]) -> tuple[None, Array]:
        number, node = point
        eps = rng.normal(rng.stream(keys, rng.Stream.FORWARD, number), x0.shape[1:], x0.dtype)
        off = (denoiser(diffuse(x0, eps, node), node).x0 - x0).astype(jnp.float32)
        return None, _ordered_sum(jnp.where(counts, off**2, 0)) / size

    return jax.lax.scan(error, None, (jnp.arange(points.alpha.shape[0]), points))[1]


def summarize(
    errors: ArrayLike,
    points: Node,
    parameterization: Parameterization,
    weighting: losses.Weighting = losses.unit,
) -> Summary:
    """Returns the means over all examples and their standard errors, computed in float64.

    Args:
      errors: those of all batches, in the order of the examples, `(N, examples)`.
      points: the nodes.
      parameterization: what the network predicts, whose weighted loss is `weighted`.
      weighting: that of training.

    Raises:
      ValueError: `errors` is not `(N, examples)` with at least one example.
    """
    errors = np.asarray(errors, np.float64)
    if errors.ndim != 2 or errors.shape[0] != points.alpha.shape[0] or not errors.shape[1]:
        raise ValueError(
            f"errors must be ({points.alpha.shape[0]}, examples) for these points, got "
            f"{errors.shape}"
        )
    alpha, sigma = (np.asarray(a, np.float64) for a in (points.alpha, points.sigma))

    def worth(a: ArrayLike, b: ArrayLike) -> np.ndarray:
        # What an error of x0 is worth in the output of a row (`jaxdiff.predictions`, eq. 3).
        a, b = (np.asarray(coefficient, np.float64) for coefficient in (a, b))
        return np.broadcast_to(((b * alpha - sigma * a) / sigma) ** 2, alpha.shape)[:, None]

    weight = np.asarray(weighting(parameterization, points), np.float64)[:, None]
    with np.errstate(divide="ignore"):
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    return Summary(
        log_snr,
        _estimate(errors),
        _estimate(worth(*predictions.eps.row(points)) * errors),
        _estimate(worth(*predictions.v.row(points)) * errors),
        _estimate(np.mean(weight * worth(*parameterization.row(points)) * errors, axis=0)),
    )


def _ordered_sum(values: Array) -> Array:
    """Sums over all axes but the first by halves, in an order that no compiler may change."""
    values = values.reshape(values.shape[0], -1)
    while (size := values.shape[1]) > 1:
        half = size // 2
        pairs = values[:, :half] + values[:, half : 2 * half]
        values = jnp.concatenate([pairs, values[:, 2 * half :]], axis=1)
    return values[:, 0]


def _estimate(values: np.ndarray) -> Estimate:
    """Returns the mean over the last axis and its standard error."""
    num = values.shape[-1]
    mean = values.mean(axis=-1)
    if num == 1:
        return Estimate(mean, np.full_like(mean, np.nan))
    return Estimate(mean, values.std(axis=-1, ddof=1) / np.sqrt(num))
