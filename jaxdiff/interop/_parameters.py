"""Parameters of our networks from tensors of PyTorch's, and back.

What there is a weight (out, in, *kernel), is here a kernel (*kernel, in, out). Convolutions of
width 1, which are there (out, in, 1, ...), are dense layers here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.base import PyTree
from jaxdiff.models import UNet


class Slot(NamedTuple):
    """Where a parameter stands among the tensors.

    Attributes:
      name: of the tensor.
      ones: how many axes of length 1 a dense layer's weight has there, behind its own.
    """

    name: str
    ones: int = 0


SlotOf = Callable[[tuple[str, ...]], Slot]


def shapes_of(model: UNet, in_channels: int) -> PyTree:
    """Returns the shapes of the parameters of a network for images."""
    size = 2 ** (len(model.channel_multipliers) - 1)
    x = jax.ShapeDtypeStruct((1, size, size, in_channels), jnp.float32)
    label = None if model.num_classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
    level = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x, level, label)


def from_tensors(
    where: str, tensors: Mapping[str, np.ndarray], shapes: PyTree, slot_of: SlotOf
) -> PyTree:
    """Returns the parameters, float32, that tensors hold.

    Args:
      where: the file, for messages.
      tensors: all tensors of it.
      shapes: the shapes of the parameters.
      slot_of: says where the parameter at a path of keys stands.

    Raises:
      ValueError: a tensor is missing, is one too many, is of another shape or holds no floats.
    """
    slots = {slot_of(_keys(path)).name for path, _ in jax.tree.leaves_with_path(shapes)}
    if extra := [name for name in tensors if name not in slots]:
        raise ValueError(
            f"{where}: tensor {extra[0]!r} of shape {tensors[extra[0]].shape} has no place in the "
            f"network ({len(extra)} such in all): is it another's config?"
        )

    def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        keys = _keys(path)
        slot = slot_of(keys)
        expected = _to_torch(keys, np.broadcast_to(np.float32(0), leaf.shape), slot.ones).shape
        if slot.name not in tensors:
            raise ValueError(f"{where}: tensor {slot.name!r} of shape {expected} is missing")
        tensor = tensors[slot.name]
        if tensor.shape != expected or not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{where}: tensor {slot.name!r} must be of floats and of shape {expected}, got "
                f"{tensor.dtype} of shape {tensor.shape}"
            )
        return jnp.asarray(_from_torch(keys, tensor.astype(np.float32), slot.ones))

    return jax.tree.map_with_path(read, shapes)


def to_tensors(params: PyTree, shapes: PyTree, slot_of: SlotOf) -> dict[str, np.ndarray]:
    """Returns the tensors that hold parameters; the inverse of `from_tensors`.

    Raises:
      ValueError: the parameters are not those of the network; names one.
    """
    given = {_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    expected = {_keys(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
    for keys in {**expected, **given}:
        got = np.shape(given[keys]) if keys in given else None
        if got != expected.get(keys):
            raise ValueError(
                f"params must be those of the model: {'/'.join(keys)} must be of shape "
                f"{expected.get(keys)}, got {got} (None: there is none)"
            )
    slots = {keys: slot_of(keys) for keys in expected}
    return {
        slot.name: _to_torch(keys, np.asarray(given[keys]), slot.ones)
        for keys, slot in slots.items()
    }


def _keys(path: tuple) -> tuple[str, ...]:
    """Returns a path's keys without the collection that all parameters are in."""
    return tuple(str(key.key) for key in path)[1:]


def _to_torch(keys: tuple[str, ...], leaf: np.ndarray, ones: int) -> np.ndarray:
    """Returns a parameter as PyTorch has it."""
    if keys[-1] != "kernel":
        return leaf
    turned = leaf.transpose(-1, -2, *range(leaf.ndim - 2))
    return turned.reshape(turned.shape + (1,) * ones)


def _from_torch(keys: tuple[str, ...], tensor: np.ndarray, ones: int) -> np.ndarray:
    """Returns PyTorch's tensor as our parameter."""
    if keys[-1] != "kernel":
        return tensor
    tensor = tensor.reshape(tensor.shape[: tensor.ndim - ones])
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)
