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

from jaxdiff.base import Array, Node


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
    PATH = 9  # sampling: the Brownian path of an example
    KNOWN = 10  # editing: the noise on known data; the step's index is folded in above it
    CORRECTOR = 11  # sampling: Langevin steps; the step's index is folded in above it
    OFFSET = 12  # training: offset noise
    SELF_CONDITION = 13  # training: whether an example sees its own prediction
    UP = 14  # sampling: moves of the grid towards noise; the step's index is folded in below it
    LENGTH = 15  # sampling: how long a sequence is
    PROBE = 16  # likelihood: a trace's directions; their number is folded in below it
    DEQUANTIZE = 17  # likelihood: noise within the levels; the draw's number is folded in below it


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


def at_node(keys: Array, node: Node) -> Array:
    """Returns the keys of a node: where a solver's keys are the same in every step."""
    # Both levels: next to pure noise sigma alone is the same at several nodes, in float32.
    for level in (node.alpha, node.sigma):
        level = jnp.broadcast_to(jnp.asarray(level, jnp.float32), keys.shape)
        bits = jax.lax.bitcast_convert_type(level, jnp.uint32)
        keys = jax.vmap(jax.random.fold_in)(keys, bits)
    return keys


def normal(keys: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Draws standard normal noise of `shape` for each of the keys `(B,)`: `(B, *shape)`."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def uniform(keys: Array) -> Array:
    """Draws one float32 in [0, 1) for each of the keys `(B,)`."""
    return jax.vmap(jax.random.uniform)(keys)


def ornstein_uhlenbeck(
    keys: Array, half_log_snr: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> Array:
    """Reads a stationary Ornstein-Uhlenbeck path of unit variance at one of its times.

    The noise in x_t, in units of sigma_t, is such a path over the time lambda = log(alpha/sigma)
    when x_t follows the reverse SDE: cov(z(a), z(b)) = exp(-|a - b|). A path is a function of its
    key alone; whoever reads it at fewer times sees the same path (a Brownian tree, as in Li et al.
    2020, by Ornstein-Uhlenbeck bridges).

    Args:
      keys: typed keys, `(B,)`, one a path.
      half_log_snr: the time lambda, `()` or `(B,)`. Below -16 and above 16 the path is read at
        the bound.
      shape: the shape of an example; each of its entries is a path of its own.
      dtype: of the result.

    Returns:
      `(B, *shape)`.
    """
    half_log_snr = jnp.broadcast_to(jnp.asarray(half_log_snr, dtype), keys.shape)
    return jax.vmap(lambda key, time: _read_path(key, time, shape, dtype))(keys, half_log_snr)


_PATH_END = 16.0
_PATH_DEPTH = 18  # cells of 32 / 2^18, about 1e-4


def _read_path(key: Array, time: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    def draw(node: Array | int) -> Array:
        return jax.random.normal(jax.random.fold_in(key, node), shape, dtype)

    def between(left: Array, right: Array, to_left: Array, to_right: Array, z: Array) -> Array:
        # The bridge: z(t) given its values at distances to_left and to_right.
        whole = -jnp.expm1(-2 * (to_left + to_right))
        near_left, near_right = -jnp.expm1(-2 * to_left), -jnp.expm1(-2 * to_right)
        mean = (
            jnp.exp(-to_left) * near_right * left + jnp.exp(-to_right) * near_left * right
        ) / whole
        return mean + jnp.sqrt(near_left * near_right / whole) * z

    time = jnp.clip(time, -_PATH_END, _PATH_END)
    left = draw(0)
    decay = jnp.exp(jnp.asarray(-2 * _PATH_END, dtype))
    right = decay * left + jnp.sqrt(1 - decay**2) * draw(1)
    width = jnp.asarray(2 * _PATH_END, dtype)
    cell = (jnp.asarray(-_PATH_END, dtype), width, left, right, jnp.uint32(1))

    def halve(cell: tuple, _: None) -> tuple[tuple, None]:
        start, width, left, right, node = cell
        half = width / 2
        middle = between(left, right, half, half, draw(node + 1))
        upper = time >= start + half
        start = jnp.where(upper, start + half, start)
        ends = jnp.where(upper, middle, left), jnp.where(upper, right, middle)
        return (start, half, *ends, 2 * node + upper.astype(jnp.uint32)), None

    (start, width, left, right, node), _ = jax.lax.scan(halve, cell, None, length=_PATH_DEPTH)
    to_left = jnp.clip(time - start, 0, width)
    return between(left, right, to_left, width - to_left, draw(node + 1))
