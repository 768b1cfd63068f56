"""Training-time samplers of t: functions `(key, index, num_steps) -> t`.

`key` is the step's key and `index` `(B,)` the numbers of the examples in the global batch, so that
the times, like all that is random, do not depend on how the batch is divided over devices.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff.base import Array
from jaxdiff.process import uniform_index

Timesteps = Callable[[Array, Array, int], Array]
"""`(key, index (B,), num_steps) -> t`, int32 `(B,)` in `0 .. num_steps-1`."""


def uniform(key: Array, index: Array, num_steps: int) -> Array:
    """Draws t uniformly and independently for each example (Ho et al. 2020, algorithm 1).

    Args:
      key: one typed key, the step's.
      index: int32 `(B,)`, the numbers of the examples in the global batch.
      num_steps: T.

    Returns:
      int32 `(B,)` in `0 .. T-1`.
    """
    return uniform_index(_draw(key, index), num_steps)


def stratified(num_strata: int) -> Timesteps:
    """Draws t uniformly, but evenly spread over the batch: example i from stratum i mod n.

    u_i = ((i mod n) + U_i) / n, t_i = floor(u_i T). The average over a batch varies less than with
    independent times. Each t on its own is uniform only over a random position in the batch, which
    shuffled data provide.

    Args:
      num_strata: n, the size of the global batch or a divisor of it.

    Raises:
      ValueError: `num_strata` is less than 1.
    """
    if num_strata < 1:
        raise ValueError(f"num_strata must be at least 1, got {num_strata}")

    def sample(key: Array, index: Array, num_steps: int) -> Array:
        return uniform_index((index % num_strata + _draw(key, index)) / num_strata, num_steps)

    return sample


def _draw(key: Array, index: Array) -> Array:
    index = jnp.asarray(index)
    return rng.uniform(rng.stream(rng.per_example(key, index), rng.Stream.TIME))
