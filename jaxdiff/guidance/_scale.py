"""The strength of guidance: a number, one for each example, or a function of the node."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff._checks import is_concrete
from jaxdiff.base import Array, Node

Scale = float | Array | Callable[[Node], Array | float]
"""A number, an array `(B,)`, or a function of the node that returns either."""


def check_scale(scale: Scale) -> Scale:
    """Returns `scale`.

    Raises:
      TypeError: it is neither a number, an array nor a function.
      ValueError: it is a number that is not finite, or an array of more than one axis.
    """
    if callable(scale):
        return scale
    if isinstance(scale, bool) or not isinstance(
        scale, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(
            "scale must be a number, an array (B,), or a function of the node, "
            f"got {type(scale).__name__}"
        )
    if jnp.ndim(scale) > 1:
        raise ValueError(f"scale must have shape () or (B,), got {jnp.shape(scale)}")
    number = known_scale(scale)
    if number is not None and not np.isfinite(number):
        raise ValueError(f"scale must be finite, got {number}")
    return scale


def known_scale(scale: Scale) -> float | None:
    """Returns the scale if it is one number that is known while tracing, or else None."""
    if callable(scale) or not is_concrete(scale) or jnp.ndim(scale):
        return None
    return float(scale)


def read_scale(scale: Scale, node: Node, x: Array) -> Array:
    """Returns the scale at a node, with the dtype of x `(B, ...)` and axes that fit it.

    Raises:
      ValueError: it has neither shape `()` nor `(B,)`.
    """
    value = jnp.asarray(scale(node) if callable(scale) else scale, x.dtype)
    if value.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"scale must have shape () or {x.shape[:1]} for x {x.shape}, got {value.shape}"
        )
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value
