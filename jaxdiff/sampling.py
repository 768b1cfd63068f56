"""Sampling: a solver walks a grid, in one `lax.scan`.

Sample i of a key depends on the key and i alone: not on the size of the batch, nor on the number of
devices. What a sample starts from does not depend on the solver or the grid either, but for the
scale of the first node.

A grid may go up again (churn, restarts, resampling: `jaxdiff.grids`). Such a move towards noise
asks no network; from s to a noisier t it adds what is missing,

    x_t = r x_s + sqrt(sigma_t² - r² sigma_s²) z,    r = alpha_t / alpha_s                 (1)

after which the solver starts anew. A solver that `climbs` takes these moves itself.

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
from jaxdiff._checks import is_concrete
from jaxdiff.base import Array, Denoiser, Node, Solver


class Record(NamedTuple):
    """What happened on the way.

    Attributes:
      evaluations: how many evaluations of the network each example took, int32 `()`.
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
    up_noise: float = 1.0,
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
      up_noise: the standard deviation of the noise added where the grid goes up; EDM's S_noise
        (Karras et al. 2022, section 4).
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
        keys,
        denoiser,
        solver,
        grid,
        grid.sigma[0] * noise,
        up_noise=up_noise,
        trajectory_every=trajectory_every,
    )
    return x if trajectory_every is None else (x, record)


def walk(
    keys: Array,
    denoiser: Denoiser,
    solver: Solver,
    grid: Node,
    x: Array,
    *,
    up_noise: float = 1.0,
    trajectory_every: int | None = None,
) -> tuple[Array, Record]:
    """Walks the grid from given states; the only sampling loop.

    Args:
      keys: typed keys `(B,)`, one per example; the steps draw from their streams.
      denoiser: the denoiser.
      solver: the solver.
      grid: the nodes to visit, fields `(N+1,)`.
      x: the states at the grid's first node, `(B, *spatial, C)`.
      up_noise: the standard deviation of z in eq. (1), where the grid goes up.
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
    goes_up = not solver.climbs and _may_go_up(grid)

    def step(carry: tuple, i: Array) -> tuple[tuple, None]:
        state, leg, believed, record = carry
        now, next = grid[i], grid[i + 1]

        def down() -> tuple:
            if solver.one_path:
                # After a move towards noise the path is another one.
                step_keys = rng.stream(keys, rng.Stream.PATH, leg)
            else:
                step_keys = rng.stream(keys, rng.Stream.STEP, i)
            after, info = solver.step(step_keys, denoiser, state, now, next)
            return after, leg, info.x0, jnp.asarray(info.evaluations, jnp.int32)

        def up() -> tuple:
            z = rng.normal(rng.stream(keys, rng.Stream.UP, i), x.shape[1:], x.dtype)
            noisier = _towards_noise(state.x, up_noise * z, now, next)
            return solver.init(noisier, next), leg + 1, believed, jnp.int32(0)

        if goes_up:
            state, leg, x0, evaluations = jax.lax.cond(_is_up(now, next), up, down)
        else:
            state, leg, x0, evaluations = down()
        record = record._replace(evaluations=record.evaluations + evaluations)
        if trajectory_every is not None:
            # Later steps of a window overwrite the earlier ones.
            slot = i // trajectory_every
            record = record._replace(
                x=record.x.at[slot].set(state.x), x0=record.x0.at[slot].set(x0)
            )
        return (state, leg, x0 if goes_up else None, record), None

    believed = jnp.zeros_like(x) if goes_up else None
    carry = (solver.init(x, grid[0]), jnp.int32(0), believed, record)
    (state, *_, record), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
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


def _is_up(now: Node, next: Node) -> Array:
    return next.sigma * now.alpha > now.sigma * next.alpha


def _may_go_up(grid: Node) -> bool:
    if not is_concrete(grid.sigma):
        return True
    grid = jax.tree.map(np.asarray, grid)
    return bool(np.any(_is_up(grid[:-1], grid[1:])))


def _towards_noise(x: Array, z: Array, now: Node, next: Node) -> Array:
    ratio = next.alpha / now.alpha
    # As a difference of squares, in which near nodes keep their digits.
    spread = ratio * now.sigma
    variance = jnp.maximum((next.sigma - spread) * (next.sigma + spread), 0)
    return ratio * x + jnp.sqrt(variance) * z
