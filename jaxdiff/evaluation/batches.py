"""Features of many images: the same whatever batch or device they travel in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def map_batches(
    apply: Callable[[Any, jax.Array], Any],
    params: Any,
    images: np.ndarray,
    *,
    batch_size: int = 256,
    unit: int = 32,
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """Computes a function of images, batch by batch, on all devices.

    Images are cut into units by their index, and each unit is computed by itself, by one program.
    The batch size says only how many units are sent at a time: on devices of one kind neither it
    nor the number of devices changes a bit. The last unit is filled up with zeros.

    Args:
      apply: the function, `(params, images (unit, ...)) -> pytree of arrays (unit, ...)`, of each
        image by itself; hashable, and the same object in each call, or it is compiled anew.
      params: its parameters.
      images: `(N, ...)`.
      batch_size: how many images are sent at a time, rounded up to whole units on each device.
      unit: how many images are computed at a time by a device.
      devices: which; all of this process by default.

    Returns:
      What `apply` returns for all images, NumPy arrays `(N, ...)`.

    Raises:
      ValueError: there are no images, or a size is below 1.
    """
    if not len(images) or min(batch_size, unit) < 1:
        raise ValueError(
            f"expected at least 1 image, batch_size and unit, got {len(images)}, {batch_size} and "
            f"{unit}"
        )
    mesh = Mesh(np.asarray(jax.local_devices() if devices is None else devices), ("units",))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharding = NamedSharding(mesh, PartitionSpec("units"))
    # No more units a device than there are images for.
    units = -(-min(batch_size, len(images)) // (unit * mesh.size)) * mesh.size
    step = units * unit

    def one(start: int) -> Any:
        batch = np.asarray(images[start : start + step])
        full = np.zeros((step, *batch.shape[1:]), batch.dtype)
        full[: len(batch)] = batch
        full = jax.device_put(full.reshape(units, unit, *batch.shape[1:]), sharding)
        out = _run(apply, mesh, params, full)
        return jax.tree.map(lambda x: np.asarray(x).reshape(step, *x.shape[2:])[: len(batch)], out)

    parts = [one(start) for start in range(0, len(images), step)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(apply: Callable[..., Any], mesh: Mesh, params: Any, units: jax.Array) -> Any:
    def local(params: Any, units: jax.Array) -> Any:
        return jax.lax.map(functools.partial(apply, params), units)

    every, split = PartitionSpec(), PartitionSpec("units")
    return jax.shard_map(local, mesh=mesh, in_specs=(every, split), out_specs=split)(params, units)
