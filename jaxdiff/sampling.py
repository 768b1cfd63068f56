"""Sampling: a solver walks a grid, in one `lax.scan`.

Sample i of a key depends on the key and i alone: not on the size of the batch, nor on the number of
devices. What a sample starts from does not depend on the solver or the grid either, but for the
scale of the first node.

Example:
  >>> import jax
  >>> from jaxdiff import denoisers, grids, schedules, solvers
  >>> exact = denoisers.gaussian(jax.numpy.zeros((8, 8, 1)), 0.5)
  >>> grid = grids.trailing(schedules.linear(), 50)
  >>> draw = jax.jit(lambda first: sample(
  ...     jax.random.key(0), exact.denoiser, solvers.ddim(), grid, (4, 8, 8, 1), first_index=first))
  >>> [batch.shape for batch in in_batches(draw, 10)]
  [(4, 8, 8, 1), (4, 8, 8, 1), (2, 8, 8, 1)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Node, Solver


class Record(NamedTuple):
    """What happened on the way.

    Attributes:
      evaluations: how often the denoiser was called, int32 `()`.
      x: the states kept, `(K, B, *spatial, C)`, or None. State k is the one after
        `(k+1) * trajectory_every` steps; the last is the result.
      x0: the clean data believed in by the steps that led to them, shape of `x`, or None.
    """

    evaluations: Array
    x: Array | None = None
    x0: Array | None = None


def sample(
    key: Array,
    denoiser: Denoiser,
    solver: Solver,
    grid: Node,
    shape: tuple[int, ...],
    *,
    first_index: Array | int = 0,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, Record]:
    """Draws samples numbered `first_index`, `first_index + 1`, ... from pure noise.

    A sample starts from sigma * z at the grid's first node.

    Args:
      key: one typed key, the seed's.
      denoiser: the denoiser, with everything inside.
      solver: the solver.
      grid: the nodes to visit, fields `(N+1,)`.
      shape: `(B, *spatial, C)`.
      first_index: the number of the first sample, `()`.
      trajectory_every: keep each so-many-th state; memory is for those kept only.

    Returns:
      The samples, float32, `shape`; with `trajectory_every`, `(samples, Record)`.

    Raises:
      TypeError: `key` is not one typed key.
      ValueError: `shape` has no batch axis, the grid has fewer than two nodes, or
        `trajectory_every` is less than 1.
    """
    if len(shape) < 2:
        raise ValueError(f"shape must be (B, *spatial, C), got {shape}")
    keys = rng.per_example(key, first_index + jnp.arange(shape[0]))
    _check_grid(grid)
    noise = rng.normal(rng.stream(keys, rng.Stream.START), tuple(shape[1:]))
    x, record = walk(
        keys, denoiser, solver, grid, grid.sigma[0] * noise, trajectory_every=trajectory_every
    )
    return x if trajectory_every is None else (x, record)


def walk(
    keys: Array,
    denoiser: Denoiser,
    solver: Solver,
    grid: Node,
    x: Array,
    *,
    trajectory_every: int | None = None,
) -> tuple[Array, Record]:
    """Walks the grid from given states; the only sampling loop.

    Args:
      keys: typed keys `(B,)`, one per example; the steps draw from their streams.
      denoiser: the denoiser.
      solver: the solver.
      grid: the nodes to visit, fields `(N+1,)`.
      x: the states at the grid's first node, `(B, *spatial, C)`.
      trajectory_every: keep each so-many-th state.

    Returns:
      The states at the grid's last node, shape of `x`, and the record.

    Raises:
      ValueError: the grid has fewer than two nodes, or `trajectory_every` is less than 1.
    """
    num_steps = _check_grid(grid)
    if trajectory_every is not None and trajectory_every < 1:
        raise ValueError(f"trajectory_every must be at least 1, got {trajectory_every}")
    record = Record(jnp.int32(0))
    if trajectory_every is not None:
        kept = jnp.zeros((-(-num_steps // trajectory_every), *x.shape), x.dtype)
        record = Record(record.evaluations, kept, kept)

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        state, record = carry
        step_keys = rng.stream(keys, rng.Stream.STEP, i)
        state, info = solver.step(step_keys, denoiser, state, grid[i], grid[i + 1])
        record = record._replace(evaluations=record.evaluations + info.evaluations)
        if trajectory_every is not None:
            # Later steps of a window overwrite the earlier ones.
            slot = i // trajectory_every
            record = record._replace(
                x=record.x.at[slot].set(state.x), x0=record.x0.at[slot].set(info.x0)
            )
        return (state, record), None

    state = solver.init(x, grid[0])
    (state, record), _ = jax.lax.scan(step, (state, record), jnp.arange(num_steps))
    return state.x, record


def in_batches(
    draw: Callable[[int], Array],
    num_samples: int,
    *,
    first_index: int = 0,
) -> Iterator[np.ndarray]:
    """Draws any number of samples with a function that draws a batch of them.

    Args:
      draw: `first_index -> samples (B, ...)`, usually a jitted call of `sample`. It is always
        called for whole batches, so it is compiled once; what is too much is dropped.
      num_samples: how many samples in all.
      first_index: the number of the first.

    Yields:
      NumPy arrays `(B, ...)`, the last one shorter where B does not divide `num_samples`.

    Raises:
      ValueError: `num_samples` or `first_index` is negative.
    """
    if num_samples < 0 or first_index < 0:
        raise ValueError(
            f"num_samples and first_index must not be negative, got {num_samples}, {first_index}"
        )
    drawn = 0
    while drawn < num_samples:
        batch = np.asarray(draw(first_index + drawn))[: num_samples - drawn]
        drawn += batch.shape[0]
        yield batch


def _check_grid(grid: Node) -> int:
    shape = jnp.shape(grid.sigma)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"a grid needs fields (N+1,) with N >= 1, got {shape}: see jaxdiff.grids")
    return shape[0] - 1
