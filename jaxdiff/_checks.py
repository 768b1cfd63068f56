"""Checks of arguments, made while tracing, so that they cost nothing at run time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.base import Array


def is_concrete(x: Any) -> bool:
    """Returns whether the values of `x` are known now, and not only inside a compiled program."""
    return not isinstance(x, jax.core.Tracer)


def check_float(name: str, x: Array) -> Array:
    """Returns `x` as an array, which must be of a floating type.

    Raises:
      TypeError: it is not; an image of integers is the usual case.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating, scaled to [-1, 1], got {x.dtype}: "
            "for images of uint8 pass x / 127.5 - 1"
        )
    return x


def check_same_shape(**arrays: Array) -> None:
    """Checks that two named arrays have one shape.

    Raises:
      ValueError: they have not.
    """
    (first, a), (second, b) = arrays.items()
    if a.shape != b.shape:
        raise ValueError(f"{first} and {second} must have the same shape, got {a.shape}, {b.shape}")


def check_time(t: Array, x: Array) -> None:
    """Checks that `t` is a scalar or has one entry for each example of `x`.

    Raises:
      ValueError: it has not.
    """
    shape = jnp.shape(t)
    if shape not in ((), x.shape[:1]):
        raise ValueError(f"t must have shape () or {x.shape[:1]} for x {x.shape}, got {shape}")


def check_index(t: Array, num_steps: int) -> Array:
    """Returns `t` as an array of integers in `0 .. num_steps-1`.

    Raises:
      TypeError: `t` is not of an integer type.
      ValueError: a value, where known, is out of range. (Inside a compiled program nothing can be
        raised; there the caller turns what it reads into NaN.)
    """
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(
            f"t must be an integer index in 0 .. {num_steps - 1} for a discrete schedule, "
            f"got {t.dtype}"
        )
    if is_concrete(t) and t.size and (np.min(t) < 0 or np.max(t) >= num_steps):
        raise ValueError(
            f"t must lie in 0 .. {num_steps - 1}, got values from {np.min(t)} to {np.max(t)} "
            "(t = 0 is the first noisy step; the papers' t = 1 .. T)"
        )
    return t
