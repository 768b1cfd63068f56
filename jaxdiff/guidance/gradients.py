"""Guidance by a gradient: of a classifier, or of an energy of the clean data.

With the score of noisy data (alpha x0 - x) / sigma² (Tweedie's formula), a term added to the score
is one added to the clean data, times sigma² / alpha:

    score + w g    is    x0 + w (sigma² / alpha) g                                         (1)

For a classifier g = grad log p(y | x) (Dhariwal & Nichol 2021, algorithm 2 and section 4; Song et
al. 2021, section 5). For an energy E of clean data, which is to be low,

    g = -grad_x E(x0(x)),                                                                  (2)

through the denoiser: with E = -log p(y | x0) it is diffusion posterior sampling, whose
approximation is p(y | x) = p(y | x0(x)) (Chung et al. 2023, theorem 1), and with any differentiable
loss the forward universal guidance of Bansal et al. 2023. Both papers then choose the step on x in
a way of their own; here it is a multiple of eq. (1), and the multiple may depend on the node.

Where alpha is 0, x says nothing of the data and eq. (1) is 0/0: there nothing is added.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, Denoiser, Node, Prediction
from jaxdiff.guidance._scale import Scale, check_scale, read_scale


def classifier(
    denoiser: Denoiser, log_prob: Callable[[Array, Node], Array], scale: Scale = 1.0
) -> Denoiser:
    """Adds the gradient of a classifier of noisy data, eq. (1).

    Args:
      denoiser: the denoiser.
      log_prob: `(x, node) -> (B,)`, log p(y | x) of the wanted y at the level of noise of the node;
        one example's must not depend on the others.
      scale: w; 1 for Bayes' rule. A number, an array `(B,)`, or a function of the node.

    Returns:
      The denoiser. `evaluations` stays that of `denoiser`: the classifier's are not counted.

    Raises:
      TypeError: `scale` is not a number, an array or a function.
      ValueError: `scale` is not finite or has more than one axis; when called, if `log_prob` does
        not return `(B,)`.
    """
    check_scale(scale)

    def guided(x: Array, node: Node) -> Prediction:
        prediction = denoiser(x, node)
        gradient = _gradient("log_prob", lambda x: log_prob(x, node), x)
        return prediction._replace(x0=prediction.x0 + _shift(scale, node, gradient))

    return guided


def energy(denoiser: Denoiser, energy_fn: Callable[[Array], Array], scale: Scale = 1.0) -> Denoiser:
    """Moves to where the predicted clean data have less energy, eqs. (1, 2).

    Prediction and gradient come of one evaluation of the denoiser, forwards and backwards; the way
    back costs about two more in time, and the memory of training.

    Args:
      denoiser: the denoiser, which is differentiated. Clip around this one, not inside of it:
        clipped values have no gradient.
      energy_fn: `x0 (B, *spatial, C) -> (B,)`, such as half the squared distance of a measurement
        of x0 to the one wanted; one example's must not depend on the others.
      scale: w; for the distance above, one over the variance of the measurement's noise. A number,
        an array `(B,)`, or a function of the node.

    Returns:
      The denoiser, with the `evaluations` of the one inside: a pass backwards counts as none.

    Raises:
      TypeError: `scale` is not a number, an array or a function.
      ValueError: `scale` is not finite or has more than one axis; when called, if `energy_fn` does
        not return `(B,)`.
    """
    check_scale(scale)

    def guided(x: Array, node: Node) -> Prediction:
        def predict(x: Array) -> tuple[Array, Prediction]:
            prediction = denoiser(x, node)
            return prediction.x0, prediction

        x0, pull_back, prediction = jax.vjp(predict, x, has_aux=True)
        (gradient,) = pull_back(_gradient("energy_fn", energy_fn, x0))
        return prediction._replace(x0=x0 - _shift(scale, node, gradient))

    return guided


def _shift(scale: Scale, node: Node, gradient: Array) -> Array:
    """Returns w (sigma² / alpha) g, eq. (1)."""
    fields = node.over(gradient)
    signal = fields.alpha > 0
    weight = jnp.where(signal, fields.sigma**2 / jnp.where(signal, fields.alpha, 1), 0)
    return read_scale(scale, node, gradient) * weight * gradient


def _gradient(name: str, fn: Callable[[Array], Array], x: Array) -> Array:
    """Returns the gradient of each example's value with respect to that example."""

    def total(x: Array) -> Array:
        values = fn(x)
        if jnp.shape(values) != x.shape[:1]:
            raise ValueError(
                f"{name} must return one value per example, {x.shape[:1]} for x {x.shape}, "
                f"got {jnp.shape(values)}: sum over the other axes only"
            )
        return jnp.sum(values)

    return jax.grad(total)(x)
