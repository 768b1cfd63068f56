"""Randomness is an address: who draws, for which example, at which step.

Nothing is split and carried. A number is found by folding its address into the run's key:
sampling folds in the index of the sample, then the stream, then the step; training folds in the
step, then the index of the example in the global batch, then the stream. So what is drawn depends
on neither batch size, number of devices nor the order of work.

Example:
  >>> import jax
  >>> keys = per_example(jax.random.key(0), jax.numpy.arange(3))
  >>> noise = normal(stream(keys, Stream.NOISE), (8, 8, 1))
  >>> noise.shape
  (3, 8, 8, 1)
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp

from jaxdiff.base import Array


class Stream(enum.IntEnum):
    """The named streams of one address; their numbers are part of the promise and never change."""

    TIME = 1  # training: the diffusion time
    NOISE = 2  # training: the noise added to the data
    DROPOUT = 3  # training: the network's dropout
    LABEL_DROP = 4  # training: dropping of the condition
    START = 5  # sampling: the noise that a sample starts from
    STEP = 6  # sampling: the noise of the steps; the step's index is folded in below it
    FORWARD = 7  # the forward chain; the step's index is folded in below it
    DATA = 8  # data drawn from a known distribution


def check_key(key: Array) -> Array:
    """Returns `key`, which must be one typed key.

    Raises:
      TypeError: it is not a typed key (`jax.random.key`), or not a single one.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"key must be a typed key, got {dtype or type(key).__name__}: "
            "make it with jax.random.key(seed), or wrap a raw one with jax.random.wrap_key_data"
        )
    if key.ndim:
        raise TypeError(f"key must be a single key, got an array of keys of shape {key.shape}")
    return key


def per_example(key: Array, index: Array) -> Array:
    """Returns the key of each example.

    Args:
      key: one typed key: the seed's when sampling, the step's when training.
      index: int32 `(B,)`, the number of each example, counted over all batches and devices.

    Returns:
      Typed keys, `(B,)`.

    Raises:
      TypeError: `key` is not a single typed key.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(check_key(key), jnp.asarray(index))


def stream(keys: Array, name: Stream, step: Array | int | None = None) -> Array:
    """Returns the keys of a stream, or of one step of it.

    Args:
      keys: typed keys, `(B,)`.
      name: the stream.
      step: the index of the step, where the stream has steps.

    Returns:
      Typed keys, `(B,)`.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, int(name))
    if step is None:
        return keys
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def normal(keys: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Draws standard normal noise of `shape` for each of the keys `(B,)`: `(B, *shape)`."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def uniform(keys: Array) -> Array:
    """Draws one float32 in [0, 1) for each of the keys `(B,)`."""
    return jax.vmap(jax.random.uniform)(keys)
