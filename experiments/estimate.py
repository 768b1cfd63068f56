"""What follows from the figures of compiled programs: do they fit, how long do they take?

Pure arithmetic on what `experiments.ahead` finds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import chips


def usable_memory(topology: chips.Topology) -> float | None:
    """Returns the bytes that a program may use of a device's memory, or None for CPUs."""
    if topology.chip is None:
        return None
    if topology.kind == "gpu":  # JAX takes this part of it on starting
        return topology.chip.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return topology.chip.memory


def memory_needed(costs: Mapping[str, Any]) -> float | None:
    """Returns the bytes of memory that a device needs to run a program, None if not known."""
    if "refused" in costs:
        return costs["needed"]
    results = costs["outputs"] - costs["aliased"]
    return costs["arguments"] + results + costs["temporaries"] + costs["program"]


def assess(
    config: ConfigDict, topology: chips.Topology, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what follows from the figures: whether it fits, and about how long it takes.

    Args:
      config: the configuration.
      topology: the devices.
      found: what `measure` returns.

    Returns:
      "usable", bytes of a device's memory; "needed", bytes, for training (in the stage that needs
      most), and "needed_drawing", for drawing samples beside the state (None where the compiler
      does not say); "fits"; "try", advice. "steps", for each stage what `roofline` returns of a
      step, and "whole", seconds for all of them; "whole", seconds of training in all; "drawing",
      as "steps" of a batch of samples and all of them. On CPUs, whose memory and
      speed are not known here, "usable" and "fits" are None and no times are there.
    """
    trains = [stage["train"] for stage in found["stages"]]
    sample = found.get("sample")
    largest = max(trains, key=lambda costs: memory_needed(costs) or math.inf)
    result: dict[str, Any] = {
        "usable": usable_memory(topology),
        "needed": memory_needed(largest),
        "needed_drawing": None,
        "fits": None,
        "try": [],
    }
    if sample and "refused" in sample:
        result["needed_drawing"] = sample["needed"]
    elif sample:
        state = sum(found["state"].values())
        there = largest.get("arguments", state)  # as they lie on the device
        result["needed_drawing"] = there + memory_needed(sample) - sample["arguments"]
    chip = topology.chip
    if chip is None:
        return result
    refused = any("refused" in costs for costs in (*trains, sample or {}))
    most = max(result["needed"] or 0, result["needed_drawing"] or 0)
    result["fits"] = not refused and most <= result["usable"]
    if not result["fits"]:
        result["try"] = list(advice(config, topology, found, result))
    result["steps"] = []
    for stage in found["stages"]:
        step = roofline(stage["train"], chip, config.model.dtype)
        result["steps"].append({**step, "whole": step["seconds"] * stage["num_steps"]})
    result["whole"] = sum(step["whole"] for step in result["steps"])
    if sample:
        batch = roofline(sample, chip, config.model.dtype)
        batches = math.ceil(config.sample.num / config.sample.batch_size)
        result["drawing"] = {**batch, "whole": batch["seconds"] * batches}
    return result


def roofline(costs: Mapping[str, float], chip: chips.Chip, dtype: str) -> dict[str, Any]:
    """Returns about how long a program takes on a device, and what bounds it.

    Arithmetic at the peak rate or memory at the full bandwidth, whatever takes longer. Most
    programs are slower; one is faster if much of what is counted as memory stays in caches.

    Args:
      costs: of the program, see `ahead.costs`; "bytes" may be missing.
      chip: the device.
      dtype: that of the network.

    Returns:
      "arithmetic" and "memory", seconds at the peak rate and at the full bandwidth; "seconds", the
      longer of the two, and its name, "bound".

    Reference:
      Williams, Waterman & Patterson 2009, "Roofline".
    """
    times = {
        "arithmetic": costs["flops"] / (chip.float32 if dtype == "float32" else chip.bfloat16),
        "memory": costs.get("bytes", 0.0) / chip.bandwidth,
    }
    bound = max(times, key=times.__getitem__)
    return {**times, "seconds": times[bound], "bound": bound}


def advice(
    config: ConfigDict,
    topology: chips.Topology,
    found: Mapping[str, Any],
    result: Mapping[str, Any],
) -> Iterator[str]:
    """Yields what to try where a run does not fit, as flags; the first that is enough ends it."""
    usable, needed, state = result["usable"], result["needed"], sum(found["state"].values())
    trains = [stage["train"] for stage in found["stages"]]
    if needed is not None and needed <= usable and all("refused" not in each for each in trains):
        yield f"--config.sample.batch_size={_smaller_drawing(config, topology, found, result)}"
        return
    # What is not the state: temporaries, above all. It is None where the compiler does not say.
    rest = None if needed is None else max(0.0, needed - state)
    by_fsdp = {int(fsdp): size for fsdp, size in found["state_by_fsdp"].items()}
    enough = [f for f in by_fsdp if rest is not None and by_fsdp[f] + rest <= usable]
    fsdp = min(enough) if enough else min(by_fsdp, key=by_fsdp.__getitem__)
    # Of little use where it is not the state that is too large.
    if enough or state - by_fsdp[fsdp] > usable / 20:
        yield (
            f"--config.mesh.fsdp={fsdp}: the state is then {in_bytes(by_fsdp[fsdp])} on a device, "
            f"not {in_bytes(state)}"
        )
    if enough:
        return
    least = min(by_fsdp.values())
    if least >= usable:
        yield f"more devices, or larger ones: the state alone takes {in_bytes(least)} on each"
        return
    if not config.model.remat:
        yield "--config.model.remat=True: activations are then computed anew on the way back"
    local = min(stage["batch_size"] for stage in found["stages"]) // topology.devices
    now = config.train.microbatches
    parts = [k for k in range(now + 1, local + 1) if local % k == 0]
    enough = [k for k in parts if rest is not None and rest * now / k <= usable - least]
    if parts:
        k = (enough or parts[-1:])[0]
        about = f": about {in_bytes(rest * now / k)} of temporaries" if rest is not None else ""
        yield f"--config.train.microbatches={k}{about}"
    if not enough:
        yield "a smaller network, or devices with more memory"


def _smaller_drawing(
    config: ConfigDict,
    topology: chips.Topology,
    found: Mapping[str, Any],
    result: Mapping[str, Any],
) -> int:
    """Returns how many samples at a time might fit, what they take being in proportion."""
    size, needed = config.sample.batch_size, result["needed_drawing"]
    state = sum(found["state"].values())
    if needed is None or needed <= state:
        size //= 2
    else:
        size = int(size * max(0.0, result["usable"] - state) / (needed - state))
    return max(1, size - size % topology.devices if size > topology.devices else size)


def in_bytes(number: float) -> str:
    """Returns bytes of memory as text, such as 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def in_units(number: float, unit: str) -> str:
    """Returns a large number as text, such as 293 GFLOP, to three digits."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:,.3g} P{unit}" if number < 999.5 else f"{number:,.0f} P{unit}"


def in_time(seconds: float) -> str:
    """Returns a duration as text, such as 1.5 ms or 3.2 hours, to three digits."""
    for unit, size in (("days", 2 * 86400), ("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'days' else size):.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
