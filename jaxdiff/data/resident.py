"""Small data sets that reside on the device, with the batches of the pipeline.

The host still decides which examples come and what becomes of them, and Grain still runs it; but
only these decisions, a few bytes per example, travel to the device for each step. Several steps can
so be one program, with nothing but the decisions to feed it:

    arrays, addresses, take = resident(source, batch_size=128, seed=0)
    arrays = jax.device_put(arrays)                                     # once

    @jax.jit
    def train(state, arrays, address):                                  # or a scan over addresses
        return step(state, take(arrays, address))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.data._libraries import require
from jaxdiff.data._plan import make_plan
from jaxdiff.data.pipeline import iterate
from jaxdiff.data.sources import Source, gather, in_memory

if TYPE_CHECKING:
    import grain


def resident(
    source: Source, **options: Any
) -> tuple[dict[str, Any], grain.DatasetIterator, Callable[[Any, Any], dict[str, Any]]]:
    """Takes `make_pipeline` apart, into data for the device and what to do with them at each step.

    `take(arrays, next(addresses))` is the batch that `make_pipeline(source, **options)` gives for
    the same step, bit for bit, on every kind of device. The state of `addresses` is that of the
    pipeline's iterator, and a run may go over from one to the other at any step.

    Args:
      source: the examples. They are read at once, into at most `sources.MAX_BYTES`; larger ones
        must be given as `in_memory(source, max_bytes=...)`, should the device have room for them.
      **options: the arguments of `make_pipeline`. With `dequantize` the noise, made by the host,
        travels to the device: four times the bytes of the images themselves.

    Returns:
      `(arrays, addresses, take)`. `arrays` are the data set in NumPy's arrays with one row per
      example: `{"image": uint8 (N, H, W, C), "label": int32 (N,)}`, or `{"x0", "mask", "cond"}` of
      sequences, the same whatever the options, but for the source. Put them on the device, or on
      all devices alike. `addresses` is Grain's iterator over dictionaries of small arrays with one
      row per example, for the rows of this process; they may be sharded over rows, and stacked for
      a scan. `take(arrays, address) -> batch` is pure, and made for `jit`.

    Raises:
      ImportError: Grain is not installed.
      ValueError: as `make_pipeline` does; the source is too large, or its images differ in shape.

    Example:
      >>> from jaxdiff.data import from_arrays
      >>> source = from_arrays(np.zeros((5, 8, 8, 1), np.uint8), labels=np.arange(5))
      >>> arrays, addresses, take = resident(source, batch_size=4, seed=0)
      >>> batch = jax.jit(take)(arrays, next(addresses))
      >>> batch["x0"].shape, float(batch["x0"].min()), batch["cond"].shape, addresses.get_state()
      ((4, 8, 8, 1), -1.0, (4,), {'next_index': 1})
    """
    require("grain")
    plan = make_plan(source, **options)
    held = in_memory(source) if plan.shape else source
    arrays = gather(held, np.arange(len(source)))
    # The plan needs no examples any more, only their number: the host's copy may go.
    plan = dataclasses.replace(plan, source=range(len(source)))

    def take(arrays: Any, address: Any) -> dict[str, Any]:
        batch = jax.tree.map(lambda rows: jnp.take(rows, address["example"], axis=0), arrays)
        return plan.applied(batch, address, jnp)

    return arrays, iterate(plan, plan.address), take
