"""Thresholding: keeping the predicted clean data in the range of the data.

Use it last, around all other guidance. The noise that a solver derives from the prediction is that
of the thresholded one (Ho et al. 2020's code; Saharia et al. 2022, section 2.3).
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxdiff.base import Array, Denoiser, Node, Prediction


def clip_x0(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clips the predicted clean data to the range of the data (static thresholding).

    Args:
      denoiser: any denoiser.
      low: the least value of the data.
      high: the greatest value of the data.

    Returns:
      The denoiser with its `x0` in [low, high].

    Raises:
      ValueError: `low` is not less than `high`.
    """
    if not low < high:
        raise ValueError(f"low must be less than high, got {low} and {high}")

    def clipped(x: Array, node: Node) -> Prediction:
        prediction = denoiser(x, node)
        return prediction._replace(x0=jnp.clip(prediction.x0, low, high))

    return clipped


def dynamic_threshold(
    denoiser: Denoiser, percentile: float = 0.995, limit: float = 1.0
) -> Denoiser:
    """Clips each example at a percentile of its own, and shrinks it back into the data's range.

    With s the percentile of |x0| over an example, but at least the limit, x0 is clipped to [-s, s]
    and multiplied by limit / s (Saharia et al. 2022, section 2.3). It keeps saturated pixels from
    piling up at the bound under high scales, and is meant for images, not for latents.

    Args:
      denoiser: any denoiser.
      percentile: the share of an example's values that are not clipped, in (0, 1].
      limit: the data lie in [-limit, limit].

    Returns:
      The denoiser with its `x0` in [-limit, limit].

    Raises:
      ValueError: `percentile` lies outside (0, 1], or `limit` is not positive.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile must be a share in (0, 1], got {percentile}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")

    def thresholded(x: Array, node: Node) -> Prediction:
        prediction = denoiser(x, node)
        x0 = prediction.x0
        bound = jnp.quantile(jnp.abs(x0), percentile, axis=tuple(range(1, x0.ndim)), keepdims=True)
        bound = jnp.maximum(bound, limit)
        return prediction._replace(x0=jnp.clip(x0, -bound, bound) * (limit / bound))

    return thresholded
