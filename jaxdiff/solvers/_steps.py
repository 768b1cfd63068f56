"""What the solvers share.

All deterministic solvers integrate one equation, the probability flow (Song et al. 2021b, eq. 13),

    dx = x0(x) d alpha + eps(x) d sigma                                                    (1)

along which, if x0 (or eps) did not change from one node to the next, x would move by

    x' = alpha' x0 + sigma' eps                                                            (2)

exactly: this is DDIM, and the Euler step. With lambda = log(alpha/sigma) eq. (1) is solved by

    x' = sigma'/sigma x + sigma' int exp(l) x0(l) dl                                       (3)
    x' = alpha'/alpha x - alpha' int exp(-l) eps(l) dl                                     (4)

over l from lambda to lambda' (Lu et al. 2022, eq. 3.4; 2022b, eq. 8), so that a better step is eq.
(2) with a better average of x0, or of eps, over the step. A polynomial through known values m_j at
places u_j (0 at the step's begin, 1 at its end) has the average

    sum_j w_j m_j,    w_j = int_0^1 p(u) l_j(u) du,    p(u) ~ exp(h u)                     (5)

with the Lagrange polynomials l_j and h = lambda' - lambda for eq. (3), -h for eq. (4). Where a
method averages without the exponential factor, p is constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.base import Array, Node, Prediction
from jaxdiff.predictions import eps_from_x0

Frame = Literal["x0", "eps"]

# 16 points integrate eq. (5) to the last digit for steps as long as h = 20.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_POINTS, _WEIGHTS = (_POINTS + 1) / 2, _WEIGHTS / 2


class MultistepState(NamedTuple):
    """The state of a multistep solver.

    Attributes:
      x: the samples, `(B, *spatial, C)`.
      values: the predictions of the last steps, newest first, each shaped as `x`.
      places: where they were made, each shaped as a node's field.
      count: how many of them there are so far, int32 `()`.
    """

    x: Array
    values: tuple[Array, ...]
    places: tuple[Array, ...]
    count: Array


def no_past(x: Array, place: Array, order: int) -> MultistepState:
    """Returns the state before the first step of a method that uses `order` values."""
    past = range(order - 1)
    return MultistepState(
        x,
        tuple(jnp.zeros_like(x) for _ in past),
        tuple(jnp.zeros_like(place) for _ in past),
        jnp.int32(0),
    )


def remembered(
    state: MultistepState, x: Array, values: tuple[Array, ...], places: tuple[Array, ...]
) -> MultistepState:
    """Returns the state at x, with the newest of `values` and as many as it holds."""
    held = len(state.values)
    count = jnp.minimum(state.count + 1, held)
    return MultistepState(x, values[:held], places[:held], count)


def over(field: Array, x: Array) -> Array:
    """Reshapes a field `()` or `(B,)` so that it broadcasts against `x` `(B, ...)`."""
    return field if field.ndim == 0 else field.reshape(field.shape + (1,) * (x.ndim - 1))


def half_log_snr(node: Node) -> Array:
    """Returns lambda = log(alpha/sigma), held within [-40, 40], so that differences are finite."""
    return jnp.clip(node.log_snr / 2, -40, 40)


def noise_to_signal(node: Node) -> Array:
    """Returns sigma/alpha, held below 1e6."""
    return jnp.minimum(node.sigma / jnp.maximum(node.alpha, 1e-6), 1e6)


def read(prediction: Prediction, x: Array, node: Node, frame: Frame) -> Array:
    """Returns what of a prediction is averaged: x0 or eps."""
    return prediction.x0 if frame == "x0" else eps_from_x0(prediction.x0, x, node)


def move(x: Array, value: Array, now: Node, next: Node, frame: Frame) -> Array:
    """Takes eq. (2) with a given x0, or a given eps."""
    now, next = now.over(x), next.over(x)
    if frame == "x0":
        ratio = next.sigma / now.sigma
        return ratio * x + (next.alpha - ratio * now.alpha) * value
    ratio = next.alpha / now.alpha
    return ratio * x + (next.sigma - ratio * now.sigma) * value


def move_by(
    x: Array, prediction: Prediction, average: Array, now: Node, next: Node, frame: Frame
) -> Array:
    """Takes eq. (2) with the average instead of the prediction's own value.

    Unlike `move` it has no singularity where all the prediction says is used: from a node without
    signal.
    """
    x0, own = prediction.x0, read(prediction, x, now, frame)
    eps = own if frame == "eps" else eps_from_x0(x0, x, now)
    now, next = now.over(x), next.over(x)
    if frame == "x0":
        gain = next.alpha - now.alpha * next.sigma / now.sigma
    else:
        there = now.alpha > 0
        gain = next.sigma - now.sigma * next.alpha / jnp.where(there, now.alpha, 1)
        gain = jnp.where(there, gain, 0)
    return next.alpha * x0 + next.sigma * eps + gain * (average - own)


def average_weights(
    places: Sequence[Array], begin: Array, end: Array, tilt: Array | float
) -> list[Array]:
    """Returns the weights w_j of eq. (5).

    Args:
      places: where the values are known, `()` or `(B,)` each, distinct.
      begin: where the step begins, in the same coordinate.
      end: where it ends.
      tilt: the exponent of p, `()` or `(B,)`; 0 for a constant p.
    """
    axes = (None,) * begin.ndim
    points = jnp.asarray(_POINTS[(*axes, slice(None))], begin.dtype)
    log_weights = jnp.asarray(np.log(_WEIGHTS)[(*axes, slice(None))], begin.dtype)
    tilt = jnp.broadcast_to(jnp.asarray(tilt, begin.dtype), begin.shape)
    shares = jax.nn.softmax(tilt[..., None] * points + log_weights, axis=-1)
    u = [((place - begin) / (end - begin))[..., None] for place in places]
    weights = []
    for j, own in enumerate(u):
        basis = jnp.ones_like(shares)
        for m, other in enumerate(u):
            if m != j:
                basis = basis * (points - other) / (own - other)
        weights.append(jnp.sum(shares * basis, axis=-1))
    return weights


def weighted_sum(weights: Sequence[Array], values: Sequence[Array]) -> Array:
    """Returns sum_j w_j m_j."""
    terms = [over(w, m) * m for w, m in zip(weights, values, strict=True)]
    return sum(terms[1:], terms[0])


def average(
    values: Sequence[Array],
    places: Sequence[Array],
    begin: Array,
    end: Array,
    tilts: Sequence[Array | float],
    order: Array,
) -> Array:
    """Returns the average, eq. (5), of the polynomial through the first `order` of the values.

    Args:
      values: the values, newest first.
      places: where they are known.
      begin: where the step begins.
      end: where it ends.
      tilts: for each order 1, 2, ... the exponent of p.
      order: how many values to use, int32 `()` or `(B,)`.
    """
    # Places not in use yet are anywhere else, so that nothing is divided by zero.
    width = end - begin
    order = jnp.broadcast_to(order, begin.shape)
    places = [
        jnp.where(j < order, place, begin - (j + 1) * width) for j, place in enumerate(places)
    ]
    zero = jnp.zeros_like(begin)
    chosen = [zero] * len(places)
    for p, tilt in enumerate(tilts[: len(places)], start=1):
        weights = average_weights(places[:p], begin, end, tilt)
        weights += [zero] * (len(places) - p)
        chosen = [jnp.where(order == p, w, c) for w, c in zip(weights, chosen, strict=True)]
    return weighted_sum(chosen, values)


def unless_clean(next: Node, refined: Callable[[], Any], plain: Callable[[], Any], x: Array) -> Any:
    """Returns `refined()`, or `plain()` where the step arrives at the clean node.

    Where all examples are at one node, only one of the two is computed. Each returns an array like
    `x` and the number of evaluations.
    """
    if jnp.ndim(next.sigma) == 0:

        def counted(choice: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> tuple[Array, Array]:
                value, evaluations = choice()
                return value, jnp.asarray(evaluations, jnp.int32)

            return run

        return jax.lax.cond(next.sigma > 0, counted(refined), counted(plain))
    (a, evaluations), (b, _) = refined(), plain()
    return jnp.where(next.over(x).sigma > 0, a, b), evaluations
