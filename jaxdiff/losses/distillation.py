"""Progressive distillation: a student that takes two of its teacher's steps in one.

From x at a node `now` the teacher takes two DDIM steps (Salimans & Ho 2022, algorithm 2), over
`mid` to `next`. With ' and '' for the fields of `mid` and `next`, and x0_1, x0_2 for the clean data
that the teacher believes in at its two steps,

    x'' = (sigma''/sigma) x + (alpha'' - (sigma''/sigma) alpha) x~                         (1)
    x~  = s x0_1 + (1 - s) x0_2                                                            (2)
    s   = sigma'' (alpha' sigma - alpha sigma') / (sigma' (alpha'' sigma - alpha sigma''))  (3)

Eq. (1) defines x~, the target of the student: one DDIM step with it arrives where the two steps do.
Eq. (2) is the same x~ without the subtraction of near numbers that solving eq. (1) for it would
take. At a clean `next`, s = 0.

A teacher of 2N steps is distilled into a student of N, which is the teacher of the next student, of
N/2 steps:

    grid = grids.trailing(schedule, 2 * N)             # the teacher's
    loss_fn = progressive_distillation(apply_fn, teacher, grid, predictions.v)
    ...                                                # train, from the teacher's parameters
    sample(key, student, solvers.ddim(), grid[::2], shape)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import rng
from jaxdiff._checks import check_float, is_concrete
from jaxdiff.base import Array, Batch, Denoiser, LossFn, Network, Node, PyTree
from jaxdiff.losses._masks import fill_masked, masked_mean
from jaxdiff.losses.weightings import Weighting, truncated_snr
from jaxdiff.predictions import Parameterization, check_signal, eps_from_x0
from jaxdiff.process import diffuse, uniform_index

Teacher = Callable[[PyTree], Denoiser]
"""`cond -> denoiser`, the teacher under a batch's condition (None where it has none).

Its guidance is inside, so a student of a guided teacher needs none. Large parameters that a teacher
closes over become constants of the compiled train step; where that is too much, make the loss
inside the step, from parameters that are the step's argument.
"""


def progressive_distillation(
    apply_fn: Network,
    teacher: Teacher,
    grid: Node,
    parameterization: Parameterization,
    weighting: Weighting = truncated_snr,
    *,
    dropout: bool = False,
) -> LossFn:
    """Makes the loss of a student of N steps of a teacher of 2N (Salimans & Ho 2022, algorithm 2).

    Args:
      apply_fn: the student, `(params, x, noise_level, cond) -> output`.
      teacher: `cond -> denoiser`; of one without condition, `lambda cond: denoiser`.
      grid: the teacher's grid, `(2N+1,)`, from noise to data; the student's is `grid[::2]`.
      parameterization: what the student predicts.
      weighting: as in `denoising_loss`.
      dropout: whether to pass the student one key per example as `dropout_keys=`.

    Returns:
      `loss_fn(params, key, batch) -> (per_example, aux)`, batch and result as in `denoising_loss`.
      Each example is at one of the student's N steps, all equally likely.

    Raises:
      ValueError: the grid has an even number of nodes or goes up, or starts at zero signal where
        the parameterization says nothing about clean data.
    """
    num_nodes = check_descent(grid)
    if num_nodes % 2 == 0:
        raise ValueError(
            f"the grid must have 2N+1 nodes, for N steps of the student, got {num_nodes}: give the "
            "teacher an even number of steps"
        )
    check_signal(parameterization, starts_at_zero_snr(grid))

    def loss_fn(params: PyTree, key: Array, batch: Batch) -> tuple[Array, Mapping[str, Any]]:
        x0, eps, keys = draw(key, batch)
        step = uniform_index(rng.uniform(rng.stream(keys, rng.Stream.TIME)), num_nodes // 2)
        now, mid, next = grid[2 * step], grid[2 * step + 1], grid[2 * step + 2]
        cond = batch.get("cond")
        x = diffuse(x0, eps, now)
        clean = jax.lax.stop_gradient(two_step_target(teacher(cond), x, now, mid, next))
        target = parameterization.target(clean, eps_from_x0(clean, x, now), now)
        output = with_dropout(apply_fn, keys, dropout)(params, x, now.t, cond)
        error = jnp.square(output.astype(jnp.float32) - target)
        loss = weighting(parameterization, now) * masked_mean(error, batch.get("mask"))
        return loss, {"t": now.t, "loss": loss}

    return loss_fn


def two_step_target(teacher: Denoiser, x: Array, now: Node, mid: Node, next: Node) -> Array:
    """Returns the x0 with which one DDIM step goes where two of the teacher's do, eqs. (1)-(3).

    Args:
      teacher: the teacher.
      x: the states at `now`, `(B, *spatial, C)`.
      now: the noisiest of the nodes; scalar or `(B,)` fields, sigma > 0.
      mid: the node between, sigma > 0.
      next: the cleanest, possibly clean data.

    Returns:
      Shape of `x`.
    """
    first = teacher(x, now).x0
    second = teacher(diffuse(first, eps_from_x0(first, x, now), mid), mid).x0
    now, mid, next = now.over(x), mid.over(x), next.over(x)
    to_mid = mid.alpha * now.sigma - now.alpha * mid.sigma
    to_next = next.alpha * now.sigma - now.alpha * next.sigma
    share = next.sigma * to_mid / (mid.sigma * to_next)
    return share * first + (1 - share) * second


def draw(key: Array, batch: Batch) -> tuple[Array, Array, Array]:
    """Returns a batch's clean data, the noise for it and the examples' keys `(B,)`."""
    x0 = fill_masked(check_float("x0", batch["x0"]), batch.get("mask"))
    index = batch.get("index")
    keys = rng.per_example(key, jnp.arange(x0.shape[0]) if index is None else index)
    return x0, rng.normal(rng.stream(keys, rng.Stream.NOISE), x0.shape[1:], x0.dtype), keys


def with_dropout(apply_fn: Network, keys: Array, dropout: bool) -> Network:
    """Returns the network with the examples' dropout keys, if there is dropout."""
    if not dropout:
        return apply_fn
    return partial(apply_fn, dropout_keys=rng.stream(keys, rng.Stream.DROPOUT))


def check_descent(grid: Node) -> int:
    """Returns the number of a grid's nodes, which must go from noise to data, each cleaner.

    Raises:
      ValueError: the grid is no grid, or, where its values are known, does not descend.
    """
    shape = jnp.shape(grid.sigma)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"a grid needs fields (N+1,) with N >= 1, got {shape}: see jaxdiff.grids")
    if is_concrete(grid.sigma):
        alpha, sigma = (np.asarray(field, np.float64) for field in (grid.alpha, grid.sigma))
        bad = np.flatnonzero(~(sigma[:-1] * alpha[1:] > sigma[1:] * alpha[:-1])).tolist()
        if bad:
            raise ValueError(
                "each node of the grid must be cleaner than the one before it, which node "
                f"{bad[0] + 1} is not"
            )
    return shape[0]


def starts_at_zero_snr(grid: Node) -> bool:
    """Whether the grid's first node is known to hold no signal."""
    return is_concrete(grid.alpha) and float(np.asarray(grid.alpha)[0]) == 0.0
