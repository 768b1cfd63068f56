"""Guidance: functions from denoiser to denoiser.

All of them work on the clean data that a denoiser believes in. Noise, score and velocity follow
from it and x, so whatever is changed here, the solver stays consistent with it.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxdiff.base import Array, Denoiser, Node, Prediction


def clip_x0(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clips the predicted clean data to the range of the data (static thresholding).

    Use it last, around all other guidance. The noise that a solver derives from the prediction is
    that of the clipped one (Ho et al. 2020's code; Saharia et al. 2022, section 2.3).

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
