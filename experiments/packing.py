"""A train state of a few long vectors in place of hundreds of small arrays.

Adam, averages and norms are then one operation each, not one an array; gradients are summed among
devices at once; and a call has few arguments. It pays where a step takes some tens of milliseconds
(`runtime.packs`). What is saved and shown is the state as it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import runtime
from jaxdiff.base import Array, PyTree
from jaxdiff.training import TrainState, sharding


def pack(tree: PyTree, params: PyTree) -> PyTree:
    """Returns a tree with a vector in place of every part of the structure of `params`."""
    return jax.tree.map(
        lambda part: _vector(part) if _alike(part, params) else part,
        tree,
        is_leaf=lambda part: _alike(part, params),
    )


def unpack(tree: PyTree, like: PyTree, params: PyTree) -> PyTree:
    """Returns the tree that `pack` was given.

    Args:
      tree: what `pack` returned.
      like: the structure of what it was given.
      params: the shapes of a part that is packed.
    """
    return jax.tree.map(
        lambda whole, part: _tree(part, params) if _alike(whole, params) else part,
        like,
        tree,
        is_leaf=lambda whole: _alike(whole, params),
    )


def for_training(
    like: TrainState, mesh: Mesh
) -> tuple[Callable[[TrainState], TrainState], Callable[[TrainState], TrainState]]:
    """Returns the compiled functions that pack a state and unpack it, as the machine likes it.

    Args:
      like: the shapes of the state.
      mesh: where training runs.
    """
    params, whole = like.params, sharding.everywhere(mesh)
    if not runtime.packs(mesh, params):
        return lambda state: state, lambda state: state
    return (
        jax.jit(functools.partial(pack, params=params), out_shardings=whole),
        jax.jit(functools.partial(unpack, like=like, params=params), out_shardings=whole),
    )


def _alike(tree: PyTree, params: PyTree) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(params)


def _vector(tree: PyTree) -> Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _tree(vector: Array, params: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(params)
    parts = jax.lax.split(vector, [math.prod(leaf.shape) for leaf in leaves])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)
