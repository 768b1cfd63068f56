"""From a source to batches: order, augmentation, scaling.

The examples of a run form one endless line: epoch after epoch, each in an order of its own. Batch k
of size B is the positions kB .. (k+1)B - 1 of that line, across the ends of epochs. What happens to
an example depends on (seed, position) alone: the order is found by sorting random words, and the
random numbers of position i are those at address i of a counter-based generator (Philox), so they
are the same whatever the size of the batch, the number of processes, threads and workers. NumPy
promises that Philox's words never change, and nothing else of NumPy's randomness is used.

Grain runs it: threads, worker processes, prefetching, and the state of the iterator. Its own
`shuffle` is not used: it takes 10 to 20 microseconds per example, and its epoch e + 1 of seed s is
its epoch e of seed s + 1, so runs that differ in the seed would see the same orders.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdiff.data._libraries import require
from jaxdiff.data.sources import Source, check_image, gather

if TYPE_CHECKING:
    import grain

# The streams of a seed; part of the promise, never to change.
_ORDER, _FLIP, _NOISE, _CROP = 1, 2, 3, 4
_UNBOUNDED = 2**62  # positions in an endless run; Philox counts further than that


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
      num_threads: how many batches are made at a time; 0 makes them when asked for.
      prefetch: how many batches are held ready (per worker, if there are workers).
      worker_count: how many processes make batches, for sources that are slow to decode. Each holds
        a copy of the source; the script must guard its entry with `if __name__ == "__main__"`.

    Returns:
      The iterator.

    Raises:
      ImportError: Grain is not installed.
      ValueError: an argument is out of range, the source is empty or too small for one batch, or
        its images are not uint8 `(H, W, C)`. Images that differ in shape are found when they are
        read.

    Example:
      >>> from jaxdiff.data import from_arrays
      >>> source = from_arrays(np.zeros((5, 8, 8, 1), np.uint8), labels=np.arange(5))
      >>> batches = make_pipeline(source, batch_size=4, seed=0)
      >>> batch = next(batches)
      >>> batch["x0"].shape, float(batch["x0"].min()), batch["cond"].shape, batches.get_state()
      ((4, 8, 8, 1), -1.0, (4,), {'next_index': 1})
    """
    grain = require("grain")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("process_count", process_count, 1),
        ("num_epochs", 1 if num_epochs is None else num_epochs, 1),
        ("num_threads", num_threads, 0),
        ("prefetch", prefetch, 0),
        ("worker_count", worker_count, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in 0 .. {process_count - 1} (process_count={process_count}), "
            f"got {process_index}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size is that of all processes together, so it must be a multiple of "
            f"process_count={process_count}, got {batch_size}"
        )
    if not len(source):
        raise ValueError("the source is empty")
    if not 0 <= crop <= 1:
        raise ValueError(f"crop must lie in [0, 1], got {crop}")
    sequences = "x0" in source[0]
    if crop and not sequences:
        raise ValueError("crop is for sequences, and the source has images")
    if sequences and (flip or dequantize or pad_to is not None):
        raise ValueError("flip, dequantize and pad_to are for images, and the source has sequences")
    shape = () if sequences else check_image(source[0]["image"], "image 0").shape
    if pad_to is not None and pad_to < max(shape[:-1]):
        raise ValueError(f"pad_to must be at least the images' size {shape[:-1]}, got {pad_to}")
    total = _UNBOUNDED if num_epochs is None else num_epochs * len(source)
    if total < batch_size:
        raise ValueError(
            f"{num_epochs} epochs of {len(source)} examples do not fill one batch of {batch_size}: "
            "take a smaller batch_size or more epochs"
        )
    batches = _Batches(
        source,
        shape,
        batch_size,
        seed,
        shuffle,
        flip,
        dequantize,
        crop,
        process_index,
        process_count,
        pad_to,
    )
    steps = grain.MapDataset.range(total // batch_size).map(batches)
    dataset = steps.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    )
    if worker_count:
        flags = require("absl.flags").FLAGS
        if not flags.is_parsed():  # outside absl.app; Grain's workers ask for flags of its own
            flags.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(num_workers=worker_count)
        )
    return iter(dataset)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Makes the batch of a step; the fields are the arguments of `make_pipeline`."""

    source: Source
    shape: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool
    flip: bool
    dequantize: bool
    crop: float
    process_index: int
    process_count: int
    pad_to: int | None

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        rows = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * rows
        batch = gather(self.source, self._examples(first, rows))
        if "x0" in batch:
            return self._crop(batch, first) if self.crop else batch
        images = batch["image"]
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"all images must have one shape, but image 0 has {self.shape} and others have "
                f"{images.shape[1:]}"
            )
        if self.flip:
            flipped = _words(self.seed, _FLIP, first, rows, 1)[:, 0] % 2 == 1
            images = images.copy()
            images[flipped] = images[flipped][..., ::-1, :]
        x0 = self._scale(self._pad(images), first)
        return {"x0": x0, "cond": batch["label"]} if "label" in batch else {"x0": x0}

    def _examples(self, first: int, rows: int) -> np.ndarray:
        """Returns which examples stand at the positions `first .. first + rows - 1`."""
        size, found = len(self.source), []
        while rows:
            epoch, start = divmod(first, size)
            taken = min(rows, size - start)
            order = _order(self.seed, epoch, size) if self.shuffle else range(size)
            found.append(order[start : start + taken])
            first, rows = first + taken, rows - taken
        return np.concatenate(found)

    def _crop(self, batch: dict[str, Any], first: int) -> dict[str, Any]:
        x0, mask = batch["x0"], batch["cond"]["mask"]
        words = _words(self.seed, _CROP, first, len(x0), 3).astype(np.int64)
        whole, places = mask.sum(1), np.arange(mask.shape[1])
        cut = words[:, 0] < self.crop * 2**32
        start = np.where(cut, words[:, 1] % whole, 0)
        length = np.where(cut, 1 + words[:, 2] % (whole - start), whole)
        moved = np.minimum(start[:, None] + places, places[-1])
        mask = places < length[:, None]
        x0 = np.take_along_axis(x0, moved[..., None], axis=1)
        cond = {
            **batch["cond"],
            "mask": mask,
            "crop": np.stack([start, whole - start - length], axis=1).astype(np.float32),
        }
        x0 = np.where(mask[..., None], x0, 0)
        return {**batch, "x0": x0, "mask": mask[..., None], "cond": cond}

    def _pad(self, images: np.ndarray) -> np.ndarray:
        if self.pad_to is None:
            return images
        missing = [self.pad_to - size for size in self.shape[:-1]]
        return np.pad(images, [(0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)])

    def _scale(self, images: np.ndarray, first: int) -> np.ndarray:
        if self.dequantize:
            size = images[0].size
            words = _words(self.seed, _NOISE, first, len(images), size)
            x0 = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
            x0 = x0.reshape(images.shape)
            x0 += images
            x0 *= np.float32(1 / 128)
        else:
            x0 = np.divide(images, np.float32(127.5), dtype=np.float32)
        x0 -= 1
        return x0


@functools.lru_cache(maxsize=64)
def _key(seed: int, stream: int) -> np.ndarray:
    return np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(2, np.uint64)


def _words(seed: int, stream: int, first: int, rows: int, size: int) -> np.ndarray:
    """Returns random words at addresses: `size` for each position from `first` on.

    Philox makes 8 words of 32 bits for each value of its counter; a position owns as many values of
    the counter as it needs.

    Returns:
      uint32 `(rows, size)`.
    """
    blocks = -(-size // 8)
    bits = np.random.Philox(key=_key(seed, stream), counter=first * blocks)
    words = bits.random_raw(rows * blocks * 4).astype("<u8", copy=False).view("<u4")
    return words.reshape(rows, blocks * 8)[:, :size]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of an epoch, a permutation of `0 .. size - 1`: random words, sorted."""
    bits = np.random.Philox(key=_key(seed, _ORDER), counter=epoch << 64)
    return np.argsort(bits.random_raw(size), kind="stable")
