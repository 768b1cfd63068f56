"""Masks: which coordinates of the data count."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdiff.base import Array


def masked_mean(values: Array, mask: Array | None = None) -> Array:
    """Averages over all axes but the first, where the mask is set.

    Args:
      values: `(B, ...)`.
      mask: 0 or 1, broadcasts to `values`; None for all ones.

    Returns:
      `(B,)`; 0 for an example whose mask is empty.

    Raises:
      ValueError: the mask does not broadcast to `values`.
    """
    axes = tuple(range(1, values.ndim))
    if mask is None:
        return jnp.mean(values, axis=axes)
    mask = spread_mask(mask, values).astype(values.dtype)
    # A masked value may be anything, also infinite or NaN.
    total = jnp.sum(jnp.where(mask > 0, values * mask, 0), axis=axes)
    return total / jnp.maximum(jnp.sum(mask, axis=axes), 1)


def fill_masked(x0: Array, mask: Array | None) -> Array:
    """Returns `x0` with zeros for masked values that are not finite.

    No gradient survives an infinite value, though its weight be zero. Finite values stay: a network
    may see what does not count.

    Args:
      x0: clean data `(B, ...)`.
      mask: 0 or 1, broadcasts to `x0`; None for all ones.

    Raises:
      ValueError: the mask does not broadcast to `x0`.
    """
    if mask is None:
        return x0
    return jnp.where((spread_mask(mask, x0) > 0) | jnp.isfinite(x0), x0, jnp.zeros_like(x0))


def spread_mask(mask: Array, values: Array) -> Array:
    """Returns the mask in the shape of `values`.

    Raises:
      ValueError: it does not broadcast to `values`.
    """
    try:
        return jnp.broadcast_to(mask, values.shape)
    except ValueError as error:
        raise ValueError(
            f"mask must broadcast to {values.shape}, got {jnp.shape(mask)}: "
            "for a mask (B, L) of sequences (B, L, C) pass mask[..., None]"
        ) from error
