"""Accelerators by name: what they can do at best, and how many there are in a topology."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """What one device can do at best.

    Attributes:
      bfloat16: FLOP/s of dense matrix products.
      float32: the same for a network in float32, in the precision that JAX chooses by default.
      bandwidth: of its memory, bytes/s.
      memory: bytes.
    """

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float


class Topology(NamedTuple):
    """So many devices of a kind.

    Attributes:
      kind: tpu, gpu or cpu.
      name: of the chip, a key of `TPUS` or `GPUS`; cpu for CPUs.
      sides: of a TPU slice, in chips; empty for others.
      devices: how many there are for JAX, which sees some chips as two.
    """

    kind: str
    name: str
    sides: tuple[int, ...]
    devices: int

    @property
    def chip(self) -> Chip | None:
        """What a device can do, or None for CPUs, which differ too much."""
        return {**TPUS, **GPUS}.get(self.name)


def _tpu(teraflops: float, gigabytes_per_second: float, gibibytes: float, cores: int = 1) -> Chip:
    # JAX rounds the factors of float32 products to bfloat16 on TPUs, unless told otherwise.
    flops = 1e12 * teraflops / cores
    return Chip(flops, flops, 1e9 * gigabytes_per_second / cores, 2**30 * gibibytes / cores)


def _gpu(teraflops: float, tf32: float, gigabytes_per_second: float, gibibytes: float) -> Chip:
    # JAX computes float32 products in TF32 on these GPUs, unless told otherwise.
    return Chip(1e12 * teraflops, 1e12 * tf32, 1e9 * gigabytes_per_second, 2**30 * gibibytes)


# Google Cloud's "System architecture" pages of each version, per chip: peak compute in bfloat16,
# bandwidth and capacity of HBM. The two cores of v2, v3 and tpu7x are two devices for JAX, those of
# v4 and v5p are one.
TPUS = {
    "v2": _tpu(45, 700, 16, cores=2),
    "v3": _tpu(123, 900, 32, cores=2),
    "v4": _tpu(275, 1228, 32),
    "v5e": _tpu(197, 819, 16),
    "v5p": _tpu(459, 2765, 95),
    "v6e": _tpu(918, 1640, 32),
    "tpu7x": _tpu(2307, 7380, 192, cores=2),
}
TWO_DEVICES_A_CHIP = ("v2", "v3", "tpu7x")
TWO_SIDES = ("v2", "v3", "v5e", "v6e")

# NVIDIA's data sheets: dense tensor cores (half of what is given "with sparsity"), in bfloat16 and
# TF32; memory bandwidth and size. H100 and H200 are the SXM ones.
GPUS = {
    "A100-40GB": _gpu(312, 156, 1555, 40),
    "A100-80GB": _gpu(312, 156, 2039, 80),
    "L4": _gpu(121, 60, 300, 24),
    "L40S": _gpu(362, 183, 864, 48),
    "H100": _gpu(989, 494, 3350, 80),
    "H200": _gpu(989, 494, 4800, 141),
}


def parse(text: str) -> Topology:
    """Reads the name of a topology: `v5e:4x4`, `gpu:8xA100-80GB` or `cpu:8`.

    Raises:
      ValueError: there is no such topology; the message says which there are.
    """
    name, _, rest = text.strip().partition(":")
    name = name.lower()
    if name == "cpu" and re.fullmatch(r"[1-9]\d*", rest):
        return Topology("cpu", "cpu", (), int(rest))
    by_lower = {gpu.lower(): gpu for gpu in GPUS}
    found = re.fullmatch(r"([1-9]\d*)x(.+)", rest.lower())
    if name == "gpu" and found and found[2] in by_lower:
        return Topology("gpu", by_lower[found[2]], (), int(found[1]))
    if name in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest):
        sides = tuple(int(side) for side in rest.split("x"))
        expected = 2 if name in TWO_SIDES else 3
        # A host has 2 x 2 chips, or the slice is a part of it.
        if len(sides) == expected and all(side == 1 or side % 2 == 0 for side in sides[:2]):
            cores = 2 if name in TWO_DEVICES_A_CHIP else 1
            return Topology("tpu", name, sides, cores * math.prod(sides))
        example = "4x4" if expected == 2 else "2x2x1 or 4x4x4"
        raise ValueError(
            f"a slice of {name} has {expected} sides, the first two 1 or even, like {example}; "
            f"got --topology={text}"
        )
    raise ValueError(
        f"--topology must be a TPU slice, VERSION:SIDES with one of {', '.join(TPUS)}, like "
        f"v5e:4x4 or v4:2x2x1; GPUs, gpu:NUMBERxNAME with one of {', '.join(GPUS)}, like "
        f"gpu:8xH100; or CPUs, like cpu:8; got {text!r}"
    )


def of_kind(kind: str) -> Chip | None:
    """Returns what a device can do, by what JAX says of it (`device_kind`); None if not known."""
    parts = set(re.split(r"\W+", kind))
    for name, chip in GPUS.items():
        if parts >= set(name.split("-")):
            return chip
    words = kind.lower().replace(" lite", "e").split()
    version = words[1] if words[:1] == ["tpu"] and len(words) > 1 else "".join(words)
    return TPUS.get({"v5": "v5p"}.get(version, version))
