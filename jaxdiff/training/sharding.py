"""Where the arrays of training live: a mesh of two axes, and a rule for each kind of array.

The mesh has the axes "data" and "fsdp". The rows of a batch are divided over both. Parameters,
their averages and the optimiser's state are divided over "fsdp", each array along its largest axis
that can be; small ones are everywhere (fully sharded data parallelism: Rajbhandari et al. 2020,
"ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP"). The compiler gathers an array where it is used
and scatters its gradient (`gathered`). With fsdp=1 everything but the batch is everywhere, which is
data parallelism.

Example:
  >>> import jax
  >>> import jax.numpy as jnp
  >>> mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
  >>> dict(mesh.shape)
  {'data': 1, 'fsdp': 1}
  >>> state = {"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)}
  >>> fully_sharded(mesh, state)["kernel"].spec
  P()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.base import PyTree

DATA, FSDP = AXES = ("data", "fsdp")
SMALL = 2**10
"""An array of fewer elements is not worth dividing."""


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh.

    Devices of one process are neighbours in it, so each process holds rows of the batch that follow
    each other, and arrays are divided within a process as far as possible.

    Args:
      data: how many parts the axis "data" has; -1 means as many as there are devices for.
      fsdp: the same of "fsdp"; one of the two may be -1.
      devices: the devices; all of them if not given.

    Returns:
      A mesh of all the devices, axes ("data", "fsdp").

    Raises:
      ValueError: the devices cannot be divided so.
    """
    devices = list(jax.devices() if devices is None else devices)
    devices.sort(key=lambda device: (device.process_index, device.id))
    sizes, count = [data, fsdp], len(devices)
    if sizes.count(-1) == 1 and all(size == -1 or size >= 1 for size in sizes):
        rest = max(sizes)  # the other one
        sizes[sizes.index(-1)] = count // rest
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise ValueError(
            f"data x fsdp must be the number of devices, {count}, got data={data}, fsdp={fsdp}: "
            "one of them may be -1, which stands for what is left"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 2)


def everywhere(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Returns the sharding of a batch, divided along `axis` over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def fully_sharded(mesh: Mesh, tree: PyTree, *, small: int = SMALL) -> PyTree:
    """Returns the sharding of each array of a state.

    Args:
      mesh: the mesh.
      tree: arrays or `jax.ShapeDtypeStruct`s.
      small: arrays of fewer elements are everywhere.

    Returns:
      A pytree like `tree` of `NamedSharding`s: along the largest axis that "fsdp" divides (the last
      of several), or everywhere if there is none.
    """
    parts = mesh.shape[FSDP]

    def choose(leaf: Any) -> NamedSharding:
        divisible = [i for i, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not divisible or np.prod(leaf.shape) < small:
            return everywhere(mesh)
        axis = max(divisible, key=lambda i: (leaf.shape[i], i))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))

    return jax.tree.map(choose, tree)


def gathered(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns parameters that are everywhere, for use inside a compiled loss.

    Their gradient is divided again as the parameters are: it is reduced once, and no device holds
    the optimiser's view of all of it.
    """
    if mesh.shape[FSDP] == 1:
        return tree
    divided = fully_sharded(mesh, tree)

    @jax.custom_vjp
    def gather(tree: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(tree, everywhere(mesh))

    def forward(tree: PyTree) -> tuple[PyTree, None]:
        return gather(tree), None

    def backward(_: None, gradient: PyTree) -> tuple[PyTree]:
        return (jax.lax.with_sharding_constraint(gradient, divided),)

    gather.defvjp(forward, backward)
    return gather(tree)


def placed(like: PyTree, shardings: PyTree | NamedSharding) -> PyTree:
    """Returns shapes, types and shardings, to restore a checkpoint by.

    Args:
      like: arrays or `jax.ShapeDtypeStruct`s.
      shardings: a pytree like it, or one sharding for all.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, like)
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        like,
        shardings,
    )


def from_rows(arrays: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns global arrays, made of the rows that each process brings.

    Args:
      arrays: NumPy arrays, this process's rows; what is global already stays as it is.
      sharding: that of `rows`.
    """

    def place(array: Any) -> jax.Array:
        if isinstance(array, jax.Array):
            return array
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(place, arrays)


def own_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that this process holds of an array divided along its first axis.

    What several processes hold is the first one's.

    Returns:
      The rows, `(n, ...)`, and their numbers in the whole array, `(n,)`, ascending.
    """
    whole = np.arange(array.shape[0])
    shards = {}  # by their first row; the copies of a shard are one
    owners = array.sharding.devices_indices_map(array.shape)
    for shard in array.addressable_shards:
        holders = [d.process_index for d, index in owners.items() if index == shard.index]
        if min(holders) == shard.device.process_index:
            numbers = whole[shard.index[0]]
            shards[int(numbers[0])] = np.asarray(shard.data), numbers
    if not shards:
        return np.zeros((0, *array.shape[1:]), array.dtype), whole[:0]
    rows, numbers = zip(*(shards[first] for first in sorted(shards)), strict=True)
    return np.concatenate(rows), np.concatenate(numbers)


def to_host(tree: PyTree) -> PyTree:
    """Returns the whole arrays as NumPy arrays on every process; all processes must call it."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
