"""From a source to batches: order, augmentation, scaling.

The order and what becomes of the examples are `jaxdiff.data._plan`'s. Grain runs it: threads,
worker processes, prefetching, and the state of the iterator. Its own `shuffle` is not used: it
takes 10 to 20 microseconds per example, and its epoch e + 1 of seed s is its epoch e of seed s + 1,
so runs that differ in the seed would see the same orders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxdiff.data._libraries import require
from jaxdiff.data._plan import Plan, make_plan
from jaxdiff.data.sources import Source

if TYPE_CHECKING:
    import grain


def make_pipeline(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    flip: bool = False,
    dequantize: bool = False,
    crop: float = 0.0,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    pad_to: int | None = None,
    shrink: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
    worker_count: int = 0,
) -> grain.DatasetIterator:
    """Makes an iterator over batches `{"x0": float32 (B, H, W, C), "cond": int32 (B,)}`.

    A pixel u in 0..255 becomes u / 127.5 - 1, in [-1, 1]. "cond" is there if the source has labels.
    Sequences (`sources.from_sequences`) come as they are: `{"x0": (B, L, C), "mask", "cond"}`, but
    for `crop`.

    The state of the iterator, `get_state()`, is `{"next_index": k}`, k the number of batches taken:
    it survives JSON, is the same on every process, and may be restored (`set_state`) with another
    number of processes or threads. With `worker_count` it is Grain's larger dictionary, which must
    be restored with the same `worker_count`.

    Args:
      source: the examples; `sources.in_memory` makes it fast.
      batch_size: the size of the global batch, over all processes.
      seed: the seed of order, flips and dequantisation.
      shuffle: whether each epoch has an order of its own; otherwise it is the source's.
      flip: whether to mirror each example left to right with probability 1/2.
      dequantize: whether to add uniform noise U in [0, 1) and scale by (u + U) / 128 - 1 instead,
        which also fills [-1, 1].
      crop: the probability that a sequence is cut to a random part of itself: of its n entries it
        starts at any alike, and ends at any from there on alike. `cond["crop"]`, float32 `(B, 2)`,
        then says how many entries lie before and behind the part; 0, 0 for a whole sequence. Told
        of it, a network learns from the parts and still draws whole sequences (augmentation that
        does not leak, Karras et al. 2022, appendix F.2).
      num_epochs: how often to go through the source, None for ever. A last batch that is not full
        is left out; the ends of the epochs before leave out nothing.
      process_index: this process, p: it gets the rows pB/n .. (p+1)B/n - 1 of each batch.
      process_count: the number of processes, n.
      pad_to: height and width to pad images to, with zeros (black, -1), on both sides alike; where
        that is uneven, one more below and to the right.
      shrink: the factor to make images smaller by, for a run that trains at low resolution first.
        After padding, each block of `shrink` pixels along every spatial axis becomes its mean,
        rounded to 0..255 (a half to the even neighbour): small images are images like any other,
        and `dequantize` adds noise to their pixels.
      num_threads: how many batches are made at a time; 0 makes them when asked for.
      prefetch: how many batches are held ready (per worker, if there are workers).
      worker_count: how many processes make batches, for sources that are slow to decode. Each holds
        a copy of the source; the script must guard its entry with `if __name__ == "__main__"`.

    Returns:
      The iterator.

    Raises:
      ImportError: Grain is not installed.
      ValueError: an argument is out of range or not for this kind of source, `shrink` does not
        divide the size of the padded images, the source is empty or too small for one batch, or
        its images are not uint8 `(H, W, C)`. Images that differ in shape are found when they are
        read.

    Example:
      >>> import numpy as np
      >>> from jaxdiff.data import from_arrays
      >>> source = from_arrays(np.zeros((5, 8, 8, 1), np.uint8), labels=np.arange(5))
      >>> batches = make_pipeline(source, batch_size=4, seed=0)
      >>> batch = next(batches)
      >>> batch["x0"].shape, float(batch["x0"].min()), batch["cond"].shape, batches.get_state()
      ((4, 8, 8, 1), -1.0, (4,), {'next_index': 1})
    """
    require("grain")
    plan = make_plan(
        source,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        flip=flip,
        dequantize=dequantize,
        crop=crop,
        num_epochs=num_epochs,
        process_index=process_index,
        process_count=process_count,
        pad_to=pad_to,
        shrink=shrink,
        num_threads=num_threads,
        prefetch=prefetch,
        worker_count=worker_count,
    )
    return iterate(plan, plan.batch)


def iterate(plan: Plan, function: Callable[[int], Any]) -> grain.DatasetIterator:
    """Returns Grain's iterator over `function(step)` for the steps of the plan."""
    grain = require("grain")
    steps = grain.MapDataset.range(plan.num_batches).map(function)
    dataset = steps.to_iter_dataset(
        grain.ReadOptions(num_threads=plan.num_threads, prefetch_buffer_size=plan.prefetch)
    )
    if plan.worker_count:
        flags = require("absl.flags").FLAGS
        if not flags.is_parsed():  # outside absl.app; Grain's workers ask for flags of its own
            flags.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(num_workers=plan.worker_count)
        )
    return iter(dataset)
