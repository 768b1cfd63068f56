"""Accelerators by name: what they can do at best, and how many there are in a topology."""

from __future__ import annotations

import importlib.util
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


class _Cuda(NamedTuple):
    """What XLA's compiler asks of a GPU.

    From NVIDIA's whitepapers, and the CUDA C++ guide's table of specifications per capability.
    """

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # of float32, of each
    clock_ghz: float
    cache_mib: int  # the second level
    threads: int = 2048  # of a core, resident
    shared_kib: int = 228  # of a core; a block may have one less


_CUDA = {
    "A100-40GB": _Cuda((8, 0), 108, 64, 1.41, 40, shared_kib=164),
    "A100-80GB": _Cuda((8, 0), 108, 64, 1.41, 40, shared_kib=164),
    "L4": _Cuda((8, 9), 58, 128, 2.04, 48, 1536, 100),
    "L40S": _Cuda((8, 9), 142, 128, 2.52, 96, 1536, 100),
    "H100": _Cuda((9, 0), 132, 128, 1.98, 50),
    "H200": _Cuda((9, 0), 132, 128, 1.98, 50),
}


def compiles_for_gpus() -> bool:
    """Returns whether JAX's plugin for CUDA is installed; it compiles without a GPU, too."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def gpu_target(name: str) -> str:
    """Returns a GPU of `GPUS` as XLA's compiler is told of it (`GpuTargetConfigProto`)."""
    gpu, cuda = GPUS[name], _CUDA[name]
    major, minor = cuda.capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_block: {48 * 2**10}
          shared_memory_per_block_optin: {(cuda.shared_kib - 1) * 2**10}
          shared_memory_per_core: {cuda.shared_kib * 2**10}
          threads_per_core_limit: {cuda.threads}
          core_count: {cuda.cores} fpus_per_core: {cuda.units}
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {cuda.cache_mib * 2**20}
          clock_rate_ghz: {cuda.clock_ghz} device_memory_size: {gpu.memory:.0f}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "{name}"
    """


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
