"""A batch computed in parts, one after the other, in the memory of one.

Part i of k holds the rows i, i + k, i + 2k, ... So a batch that is divided over devices by rows
stays so, evenly, in every part. Each example keeps its number in the global batch, and thereby all
that is drawn for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, Batch, PyTree

MeanLoss = Callable[[PyTree, Array, Batch], tuple[Array, tuple[PyTree, PyTree]]]
"""`(params, key, batch) -> (mean, (rows, sums))`: arrays `(B, ...)`, and sums over examples."""


def value_and_grad(
    mean_loss: MeanLoss, parts: int, axis_name: str | tuple[str, ...] | None = None
) -> Callable[[PyTree, Array, Batch], tuple[tuple[Array, tuple[PyTree, PyTree]], PyTree]]:
    """Returns `jax.value_and_grad(mean_loss, has_aux=True)`, computed in parts.

    Args:
      mean_loss: the mean loss of a batch, with arrays that have a row for each example, and with
        sums over the examples.
      parts: k, in how many; 1 is `jax.value_and_grad` itself.
      axis_name: the axis or axes over which the gradient differs, inside `jax.pmap` or
        `jax.shard_map`.

    Returns:
      A function of the same arguments and results. The batch's arrays are divided by rows, but for
      `history` and a `mask` that is the same for all examples. The gradients are averaged in
      float32, or in their own type if it is a wider one.

    Raises:
      ValueError: `parts` is less than 1; in the function, the batch does not divide into so many,
        or one of its arrays has not a row for each example.
    """
    check_parts(parts)
    whole = jax.value_and_grad(mean_loss, has_aux=True)
    if parts == 1:
        return whole

    def in_parts(
        params: PyTree, key: Array, batch: Batch
    ) -> tuple[tuple[Array, tuple[PyTree, PyTree]], PyTree]:
        divided, shared = _divide(batch, parts)

        def one(total: PyTree, part: Batch) -> tuple[PyTree, tuple[Array, tuple[PyTree, PyTree]]]:
            values, grads = whole(params, key, {**part, **shared})
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), values

        total = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
        )
        if axis_name is not None:
            total = jax.lax.pcast(total, axis_name, to="varying")
        total, (means, (rows, sums)) = jax.lax.scan(one, total, divided)
        grads = jax.tree.map(lambda t, p: (t / parts).astype(p.dtype), total, params)
        rows = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), rows)
        sums = jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)
        return (jnp.mean(means), (rows, sums)), grads

    return in_parts


def check_parts(parts: int) -> None:
    """Checks into how many parts a batch is to be divided.

    Raises:
      ValueError: less than 1.
    """
    if parts < 1:
        raise ValueError(f"microbatches must be at least 1, got {parts}")


def _divide(batch: Batch, parts: int) -> tuple[Batch, Batch]:
    """Returns the parts, stacked: leaves `(parts, B / parts, ...)`, and what all have in common."""
    x0 = batch["x0"]
    size = x0.shape[0]
    if size % parts:
        raise ValueError(
            f"a batch of {size} examples (on each device, inside pmap or shard_map) does not "
            f"divide into microbatches={parts} of the same size"
        )
    shared = {name: batch[name] for name in ("history",) if name in batch}
    mask = batch.get("mask")
    if mask is None or jnp.ndim(mask) < x0.ndim or jnp.shape(mask)[0] == 1:
        shared |= {name: batch[name] for name in ("mask",) if name in batch}

    def rows(path: tuple[Any, ...], leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.shape[:1] != (size,):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} must have {size} rows, one for each example, "
                f"got shape {leaf.shape}"
            )
        return jnp.swapaxes(leaf.reshape(size // parts, parts, *leaf.shape[1:]), 0, 1)

    own = {name: value for name, value in batch.items() if name not in shared}
    return jax.tree_util.tree_map_with_path(rows, own), shared
