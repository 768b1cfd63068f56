"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that costs nothing."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxdiff.base import Array, Denoiser, Info, Node, Solver
from jaxdiff.solvers import _steps
from jaxdiff.solvers._steps import half_log_snr, over


class UniPCState(NamedTuple):
    """The state of `unipc`.

    Attributes:
      x: the samples as predicted, `(B, *spatial, C)`.
      base_x: the corrected samples at the node before, shaped as `x`.
      base: that node.
      values: the predicted clean data of the last steps, newest first, each shaped as `x`.
      places: lambda at their nodes, each shaped as a node's field.
      count: how many of them there are so far, int32 `()`.
    """

    x: Array
    base_x: Array
    base: Node
    values: tuple[Array, ...]
    places: tuple[Array, ...]
    count: Array


def unipc(order: int = 2, variant: Literal["bh1", "bh2"] = "bh2") -> Solver:
    """Predicts with a polynomial of past values, and corrects when the next value is known.

    The predictor is `dpm_solver_pp("multistep")`'s average (eq. 5 of `jaxdiff.solvers._steps`) over
    `order` values. At the next node the denoiser is asked once, and its value is used both to redo
    the last step, with one value more, and to predict the next one (algorithms 1 and 2 there,
    data prediction).

    Args:
      order: p, 1 to 3; with the corrector the order is p + 1.
      variant: the paper's B(h), h or e^h - 1. It matters only where the paper takes 1/2 for the
        one unknown coefficient: in the predictor of order 2 and in the corrector of order 1.

    Returns:
      The solver, one evaluation a step. On arrival at a clean node it takes a step of order 1.

    Raises:
      ValueError: an option is none of the above.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f'variant must be "bh1" or "bh2", got {variant!r}')

    def halved(older: Array, newer: Array, width: Array) -> Array:
        """Returns the change that B(h)/2 times a difference of two values makes to the average."""
        scale = width / -jnp.expm1(-width) if variant == "bh1" else jnp.ones_like(width)
        return over(scale / 2, older) * (newer - older)

    def correct(state: UniPCState, value: Array, now: Node) -> Array:
        begin, end = half_log_snr(state.base), half_log_snr(now)
        width = end - begin
        width = jnp.where(width == 0, 1.0, width)  # before the first step; not used
        values, places = (value, *state.values), (end, *state.places)
        used = state.count + 1
        tilts = [width] * len(values)
        mean = _steps.average(values, places, begin, begin + width, tilts, used)
        simple = state.values[0] + halved(state.values[0], value, width)
        mean = jnp.where(over(used == 2, value), simple, mean)
        return _steps.move(state.base_x, mean, state.base, now, "x0")

    def predict(values: tuple, places: tuple, used: Array, now: Node, next: Node) -> Array:
        begin, end = half_log_snr(now), half_log_snr(next)
        width = end - begin
        mean = _steps.average(values, places, begin, end, [width] * order, used)
        if order == 1:
            return mean
        # The paper's D_1 / r_1, whose sign makes it an extrapolation.
        gap = jnp.where(used >= 2, (begin - places[1]) / width, 1.0)
        slope = values[0] + over(1 / gap, values[0]) * (values[0] - values[1])
        simple = values[0] + halved(values[0], slope, width)
        return jnp.where(over(used == 2, mean), simple, mean)

    def init(x: Array, node: Node) -> UniPCState:
        place = half_log_snr(node)
        return UniPCState(
            x,
            x,
            node,
            tuple(jnp.zeros_like(x) for _ in range(order)),
            tuple(jnp.zeros_like(place) for _ in range(order)),
            jnp.int32(0),
        )

    def step(
        keys: Array, denoiser: Denoiser, state: UniPCState, now: Node, next: Node
    ) -> tuple[UniPCState, Info]:
        prediction = denoiser(state.x, now)
        value = prediction.x0
        # At the clean node nothing is known of the noise: nothing was left to correct, either.
        known = (state.count > 0) & (now.sigma > 0)
        x = jnp.where(over(known, value), correct(state, value, now), state.x)
        values, places = (value, *state.values[:-1]), (half_log_snr(now), *state.places[:-1])
        count = jnp.minimum(state.count + 1, order)
        used = jnp.where(next.sigma > 0, count, jnp.ones_like(count))
        mean = predict(values, places, used, now, next)
        predicted = _steps.move(x, mean, now, next, "x0")
        state = UniPCState(predicted, x, now, values, places, count)
        return state, Info(value, prediction.evaluations)

    return Solver(init, step)
