"""Checksums of arrays, computed where they lie, that do not depend on their sharding.

Example:
  >>> import jax.numpy as jnp
  >>> of_tree({"a": jnp.arange(3.0), "b": {"c": jnp.zeros(2, jnp.bfloat16)}})
  {'a': 'float32 fc942b3e', 'b/c': 'bfloat16 e5c3b270'}
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def of_tree(tree: Any) -> dict[str, str]:
    """Returns the type and a checksum of every array of a pytree.

    The checksum is the sum modulo 2^32 of all words, each scrambled in a way that depends on its
    position. Scrambling is one to one, so a single changed word is always found, and others are
    missed once in 2^32. Sums of integers do not depend on their order, nor on the sharding.

    It is one program for the whole tree, compiled once for each structure. In a run of several
    processes all must call it.

    Args:
      tree: arrays of any shapes and of numbers or bools, on the devices of one mesh.

    Returns:
      The type and the checksum in hexadecimal, by the path of the array.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    meshes = (a.sharding.mesh for a in arrays if isinstance(_sharding(a), NamedSharding))
    mesh = next(meshes, None)
    sums = _program(mesh and NamedSharding(mesh, PartitionSpec()))(arrays)
    return {
        name(path): f"{leaf.dtype} {checksum:08x}"
        for (path, leaf), checksum in zip(leaves, np.asarray(sums).tolist(), strict=True)
    }


def name(path: jax.tree_util.KeyPath) -> str:
    """Returns the path of a leaf as text, such as `params/dense/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _sharding(array: Any) -> Any:
    return getattr(array, "sharding", None)


@functools.lru_cache(maxsize=16)
def _program(replicated: NamedSharding | None) -> Any:
    return jax.jit(_sums, out_shardings=replicated)


def _sums(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(a) for a in arrays]) if arrays else jnp.zeros(0, jnp.uint32)


@jax.jit  # traced once for each shape
def _sum(x: jax.Array) -> jax.Array:
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size % 2**32) + along
    return jnp.sum(_mix(words ^ _mix(position + jnp.uint32(1))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as integers of 32 bits, one or two an element."""
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = (jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo)(x.dtype).bits
    # Of 64 bits it makes two words, in a last axis of their own.
    unsigned = jnp.dtype(f"uint{min(bits, 32)}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    """Scrambles a word, one to one: the finaliser of Appleby's MurmurHash3 (2011)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
