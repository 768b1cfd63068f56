"""What becomes of an example: the decisions, made on the host, and what follows from them.

The examples of a run form one endless line: epoch after epoch, each in an order of its own. Batch k
of size B is the positions kB .. (k+1)B - 1 of that line, across the ends of epochs. What happens to
an example depends on (seed, position) alone: the order is found by sorting random words, and the
random numbers of position i are those at address i of a counter-based generator (Philox), so they
are the same whatever the size of the batch, the number of processes, threads and workers. NumPy
promises that Philox's words never change, and nothing else of NumPy's randomness is used.

The decisions about a batch are its *address*: which examples, which of them are mirrored, and so
on. `Plan.address` makes it and `Plan.applied` follows it, in NumPy for the pipeline and in JAX for
data that reside on the device, to the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from jaxdiff.data.sources import Source, check_image, gather

# The streams of a seed; part of the promise, never to change.
_ORDER, _FLIP, _NOISE, _CROP = 1, 2, 3, 4
_UNBOUNDED = 2**62  # positions in an endless run; Philox counts further than that


def make_plan(source: Source, **options: Any) -> Plan:
    """Checks the arguments of `make_pipeline` and returns them as a plan.

    Raises:
      ValueError: as `make_pipeline` does.
    """
    if not len(source):
        raise ValueError("the source is empty")
    sequences = "x0" in source[0]
    shape = () if sequences else check_image(source[0]["image"], "image 0").shape
    plan = Plan(source=source, shape=shape, **options)
    for name, least in (
        ("batch_size", 1),
        ("seed", 0),
        ("shrink", 1),
        ("process_count", 1),
        ("num_threads", 0),
        ("prefetch", 0),
        ("worker_count", 0),
    ):
        value = getattr(plan, name)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if plan.num_epochs is not None and plan.num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {plan.num_epochs}")
    if not 0 <= plan.process_index < plan.process_count:
        raise ValueError(
            f"process_index must be in 0 .. {plan.process_count - 1} "
            f"(process_count={plan.process_count}), got {plan.process_index}"
        )
    if plan.batch_size % plan.process_count:
        raise ValueError(
            f"batch_size is that of all processes together, so it must be a multiple of "
            f"process_count={plan.process_count}, got {plan.batch_size}"
        )
    if not 0 <= plan.crop <= 1:
        raise ValueError(f"crop must lie in [0, 1], got {plan.crop}")
    if plan.crop and not sequences:
        raise ValueError("crop is for sequences, and the source has images")
    if sequences and (plan.flip or plan.dequantize or plan.pad_to is not None or plan.shrink > 1):
        raise ValueError(
            "flip, dequantize, pad_to and shrink are for images, and the source has sequences"
        )
    if plan.pad_to is not None and plan.pad_to < max(shape[:-1]):
        raise ValueError(
            f"pad_to must be at least the images' size {shape[:-1]}, got {plan.pad_to}"
        )
    if any(size % plan.shrink for size in plan.padded):
        raise ValueError(
            f"shrink must divide the images' size {plan.padded}, got {plan.shrink}: "
            "pad them to one that it divides with pad_to"
        )
    if not plan.num_batches:
        raise ValueError(
            f"{plan.num_epochs} epochs of {len(source)} examples do not fill one batch of "
            f"{plan.batch_size}: take a smaller batch_size or more epochs"
        )
    return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The arguments of `make_pipeline`, and what follows from them for the batch of a step.

    Attributes:
      shape: the shape of the source's images, `(*spatial, C)`; `()` of sequences.
    """

    source: Source
    shape: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool = True
    flip: bool = False
    dequantize: bool = False
    crop: float = 0.0
    num_epochs: int | None = None
    process_index: int = 0
    process_count: int = 1
    pad_to: int | None = None
    shrink: int = 1
    num_threads: int = 2
    prefetch: int = 4
    worker_count: int = 0

    @property
    def padded(self) -> tuple[int, ...]:
        """The images' spatial sizes once they are padded."""
        return tuple(self.pad_to or size for size in self.shape[:-1])

    @property
    def num_batches(self) -> int:
        """The number of batches until the data end."""
        if self.num_epochs is None:
            return _UNBOUNDED // self.batch_size
        return self.num_epochs * len(self.source) // self.batch_size

    def batch(self, step: int) -> dict[str, Any]:
        """Returns the rows of a step's batch that are this process's."""
        address = self.address(step)
        batch = gather(self.source, address["example"])
        if "image" in batch and batch["image"].shape[1:] != self.shape:
            raise ValueError(
                f"all images must have one shape, but image 0 has {self.shape} and others have "
                f"{batch['image'].shape[1:]}"
            )
        return self.applied(batch, address, np)

    def address(self, step: int) -> dict[str, np.ndarray]:
        """Returns the decisions about the rows of a step's batch that are this process's.

        Returns:
          Arrays with one row per example: `"example"`, int32, its number in the source; with
          `flip`, `"flip"`, bool; with `dequantize`, `"noise"`, float32 in [0, 1), of the shape of
          the images; with `crop`, `"cut"`, bool, and `"places"`, uint32 `(rows, 2)`, random words
          that say where.
        """
        rows = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * rows
        address = {"example": self._examples(first, rows)}
        if self.flip:
            address["flip"] = _words(self.seed, _FLIP, first, rows, 1)[:, 0] % 2 == 1
        if self.dequantize:
            shape = (*(size // self.shrink for size in self.padded), self.shape[-1])
            words = _words(self.seed, _NOISE, first, rows, math.prod(shape))
            noise = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
            address["noise"] = noise.reshape(rows, *shape)
        if self.crop:
            words = _words(self.seed, _CROP, first, rows, 3)
            address["cut"] = words[:, 0] < self.crop * 2**32
            address["places"] = words[:, 1:]
        return address

    def applied(self, batch: Mapping[str, Any], address: Mapping[str, Any], xp: ModuleType) -> Any:
        """Returns the batch that the train step sees.

        Args:
          batch: the examples that the address names, as `sources.gather` gives them.
          address: the decisions, from `address`.
          xp: the module that computes, `numpy` or `jax.numpy`.
        """
        if "x0" in batch:
            return _cropped(batch, address, xp) if self.crop else batch
        images = batch["image"]
        if self.flip:
            flip = address["flip"].reshape(-1, *(1 for _ in self.shape))
            images = xp.where(flip, xp.flip(images, -2), images)
        images = self._shrunk(self._padded(images, xp), xp)
        x0 = _dequantized(images, address["noise"]) if self.dequantize else _scaled(images, xp)
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
        return np.concatenate(found).astype(np.int32)

    def _padded(self, images: Any, xp: ModuleType) -> Any:
        missing = [to - size for to, size in zip(self.padded, self.shape[:-1], strict=True)]
        if not any(missing):
            return images
        return xp.pad(images, [(0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)])

    def _shrunk(self, images: Any, xp: ModuleType) -> Any:
        if self.shrink == 1:
            return images
        rows, *sizes, channels = images.shape
        blocks = [part for size in sizes for part in (size // self.shrink, self.shrink)]
        axes = tuple(range(2, 2 + 2 * len(sizes), 2))
        sums = images.reshape(rows, *blocks, channels).sum(axes, dtype=xp.int32)
        # Rounded in integers, a half to the even neighbour, which are the same everywhere.
        count = self.shrink ** len(sizes)
        whole, rest = sums // count, sums % count
        return (whole + (2 * rest + whole % 2 > count)).astype(xp.uint8)


def _scaled(images: Any, xp: ModuleType) -> Any:
    """Returns u / 127.5 - 1 in float32, as NumPy rounds it."""
    if xp is np:
        x0 = np.divide(images, np.float32(127.5), dtype=np.float32)
        x0 -= 1
        return x0
    # XLA may divide by multiplying with a rounded reciprocal. NumPy's values are multiples of
    # 2**-24, and 2**24 / 127.5 = 131586 + 2/255: integers give the same bits on every device.
    u = images.astype(xp.int32)
    return (131586 * u + (u >= 64) + (u >= 128) - 2**24).astype(xp.float32) * np.float32(2**-24)


def _dequantized(images: Any, noise: Any) -> Any:
    """Returns (u + U) / 128 - 1 in float32: only the sum and the difference round."""
    x0 = noise + images
    x0 *= np.float32(1 / 128)
    x0 -= 1
    return x0


def _cropped(batch: Mapping[str, Any], address: Mapping[str, Any], xp: ModuleType) -> Any:
    x0, mask = batch["x0"], batch["cond"]["mask"]
    whole, places = mask.sum(1).astype(xp.uint32), xp.arange(mask.shape[1])[None]
    start = xp.where(address["cut"], address["places"][:, 0] % whole, 0)
    length = xp.where(address["cut"], 1 + address["places"][:, 1] % (whole - start), whole)
    whole, start, length = (n.astype(xp.int32) for n in (whole, start, length))
    moved = xp.minimum(start[:, None] + places, mask.shape[1] - 1)
    mask = places < length[:, None]
    x0 = xp.where(mask[..., None], xp.take_along_axis(x0, moved[..., None], axis=1), 0)
    crop = xp.stack([start, whole - start - length], axis=1).astype(xp.float32)
    cond = {**batch["cond"], "mask": mask, "crop": crop}
    return {**batch, "x0": x0, "mask": mask[..., None], "cond": cond}


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
