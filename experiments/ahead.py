"""Compiles the programs of a configuration for devices that are not there, and measures them.

`experiments.plan` starts this in a process of its own, `python -m experiments.ahead FOLDER`: what a
compiler loads and prints then stays out of the way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import build, chips, drawing, runtime
from experiments.config import default
from jaxdiff.base import PyTree
from jaxdiff.training import TrainState, sharding

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def devices_of(topology: chips.Topology) -> Sequence[Any]:
    """Returns the devices of a topology, to be compiled for.

    Those of a TPU slice need libtpu, but no TPU; for others as many CPU devices stand in, which
    must not have been started yet.
    """
    if topology.kind != "tpu":
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return jax.devices("cpu")
    per_host = (*(min(2, side) for side in topology.sides[:2]), 1)
    options: dict[str, Any] = {"chips_per_host_bounds": per_host}
    if topology.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as on Cloud TPUs
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{topology.name}:{'x'.join(map(str, topology.sides))}",
        **options,
    ).devices


def measure(config: ConfigDict, topology: chips.Topology, shape: tuple[int, ...]) -> dict[str, Any]:
    """Compiles the train step of each stage, and the sampler, and returns what they need.

    Args:
      config: the configuration, of images.
      topology: the devices.
      shape: of one example, `(*spatial, C)`, before data.shrink.

    Returns:
      What JSON holds: "parameters", "device_kind", "mesh", "state" (bytes of each device, by part),
      "state_by_fsdp" (the same of all of it, for each way to choose mesh.fsdp), "stages", a list of
      "shape", "batch_size", "num_steps", "batch" (bytes of each device) and "train", and "sample".
      The last two are what `compiled_costs` returns.
    """
    devices = devices_of(topology)
    mesh = build.make_mesh(config, devices)
    where = f"{len(devices)} x {devices[0].device_kind}"
    found: dict[str, Any] = {"device_kind": devices[0].device_kind, "mesh": dict(mesh.shape)}
    stages, begun = [], 0
    for stage, last in build.stages(config):
        shrunk = (*(side // stage.data.shrink for side in shape[:-1]), shape[-1])
        init, step = build.make_training(stage, shrunk, None, mesh)
        like, batch = jax.eval_shape(init), abstract_batch(stage, shrunk)
        places = sharding.fully_sharded(mesh, like)
        compiled_step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(places, sharding.everywhere(mesh)),
            compiler_options=runtime.compiler_options() if topology.kind == "cpu" else None,
        )
        state = sharding.placed(like, places)
        rows = sharding.placed(batch, sharding.rows(mesh))
        stages.append(
            {
                "shape": list(shrunk),
                "batch_size": stage.train.batch_size,
                "num_steps": last - begun,
                "batch": bytes_per_device(rows),
                "train": compiled_costs(
                    f"the train step for {where}",
                    compiled_step,
                    build.make_training(stage, shrunk)[1],
                    (state, rows),
                    passes=stage.train.microbatches,
                ),
            }
        )
        begun = last
    found |= {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(like.params)),
        "state": state_bytes(state),
        "state_by_fsdp": state_by_fsdp(like, devices),
        "stages": stages,
    }
    if config.sample.num:
        found["sample"] = compiled_costs(
            f"the sampler for {where}",
            *samplers(stage, shrunk, mesh),
            (state.ema, 0),
            passes=drawing.make_grid(stage).sigma.shape[0] - 1,
        )
    return found


def samplers(config: ConfigDict, shape: tuple[int, ...], mesh: Mesh) -> tuple[Any, Any]:
    """Returns the sampler of `drawing.make_draw`, to be compiled for a mesh, and not compiled."""
    alone = config.copy_and_resolve_references()
    alone.mesh.data, alone.mesh.fsdp = -1, 1
    draw = drawing.make_draw(alone, shape).__wrapped__
    divides = config.sample.batch_size % mesh.size == 0
    compiled = jax.jit(
        lambda params, first_index: draw(sharding.gathered(mesh, params), first_index),
        out_shardings=sharding.rows(mesh) if divides else sharding.everywhere(mesh),
    )
    return compiled, draw


def abstract_batch(config: ConfigDict, shape: tuple[int, ...]) -> PyTree:
    """Returns shapes and types of a batch of images, as the train step is given them."""
    size = config.train.batch_size
    batch = {"x0": jax.ShapeDtypeStruct((size, *shape), jnp.float32)}
    if config.labels.num_classes:
        batch["cond"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    return batch


def bytes_per_device(tree: PyTree) -> int:
    """Returns how many bytes of a pytree of shapes with shardings lie on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def state_bytes(state: TrainState) -> dict[str, int]:
    """Returns the bytes on each device of the parts of the training state."""
    parts = {
        "parameters": state.params,
        "optimiser": state.opt_state,
        "averages": (state.ema, state.averages),
    }
    found = {name: bytes_per_device(part) for name, part in parts.items()}
    return found | {"counts": bytes_per_device(state) - sum(found.values())}


def state_by_fsdp(like: PyTree, devices: Sequence[Any]) -> dict[str, int]:
    """Returns the bytes of the state on each device, for each way to choose mesh.fsdp."""
    found = {}
    for fsdp in range(1, len(devices) + 1):
        if len(devices) % fsdp == 0:
            mesh = sharding.make_mesh(fsdp=fsdp, devices=devices)
            state = sharding.placed(like, sharding.fully_sharded(mesh, like))
            found[str(fsdp)] = bytes_per_device(state)
    return found


def compiled_costs(
    what: str, function: Any, plain: Any, args: tuple[Any, ...], passes: int
) -> dict[str, Any]:
    """Compiles a function for its abstract arguments, and returns what it costs.

    Args:
      what: what it is, to be told.
      function: from `jax.jit`.
      plain: the same function, not compiled, that knows of no devices.
      args: with shardings.
      passes: as of `costs`.

    Returns:
      What `costs` returns; or, of a program that the compiler refuses because it does not fit, what
      it says, "refused", the bytes that it "needed", if it says so, and "flops".
    """
    print(f"plan: compiling {what}", flush=True)
    start = time.perf_counter()
    lowered = function.lower(*args)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # Of the whole program, before it is divided and fused: its bytes would mean nothing.
        with as_accelerators_do():
            whole = jax.jit(plain).lower(*jax.tree.map(_unplaced, args)).cost_analysis()
        parts = jax.tree.leaves(args)[0].sharding.num_devices
        return {**out_of_memory(str(error)), "flops": passes * whole["flops"] / parts}
    print(f"plan: compiled {what} in {time.perf_counter() - start:.0f} s", flush=True)
    return costs(compiled, passes)


def as_accelerators_do() -> contextlib.AbstractContextManager:
    """Returns a context in which a CPU convolves as accelerators do (`models.convolution`)."""
    return jax.default_matmul_precision("float32")


def _unplaced(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "sharding") else leaf


def costs(compiled: jax.stages.Compiled, passes: int = 1) -> dict[str, float]:
    """Returns what a compiled program costs on each device.

    Args:
      compiled: the program.
      passes: how often the loop that is most of it goes around: the compiler counts what stands in
        a loop once.

    Returns:
      "flops" and "bytes", read from and written to memory as the compiler counts them, times
      `passes`; "between_devices", bytes of the results of collectives; and "arguments", "outputs",
      "aliased" (outputs that take the place of arguments), "temporaries" and "program", bytes of
      memory.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "flops": passes * cost["flops"],
        "bytes": passes * cost["bytes accessed"],
        "between_devices": collective_bytes(compiled.as_text(), passes),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def collective_bytes(text: str, passes: int = 1) -> int:
    """Returns the bytes of the results of all collectives in the text of a compiled program.

    Those in a loop, or in what it calls, count `passes` times. One that is started and awaited, or
    stands in several fusions, counts once, by its channel.
    """
    parts = re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\n((?:.*\n)*?)\}", text, re.MULTILINE)
    bodies = dict(parts)
    looped, found = set(), set(re.findall(r"\bbody=%?([\w.-]+)", text))
    while found:
        looped |= found
        called = {name for body in found for name in re.findall(r"%([\w.-]+)", bodies[body])}
        found = (called & bodies.keys()) - looped
    total, names, counted = 0, "|".join(COLLECTIVES), set()
    for name, body in bodies.items():
        for shapes, started, rest in re.findall(rf"= (.*?) (?:{names})(-start)?\((.*)", body):
            channel = re.search(r"channel_id=(\d+)", rest)
            if channel and channel[1] in counted:
                continue
            counted |= {channel[1]} if channel else set()
            sizes = [_bytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)]
            # The result of one that is started may hold its operands, too.
            size = max(sizes, default=0) if started else sum(sizes)
            total += size * (passes if name in looped else 1)
    return total


def _bytes(dtype: str, sides: str) -> int:
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8


def out_of_memory(message: str) -> dict[str, Any]:
    """Returns what a compiler says of a program that does not fit: its words, and bytes."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT])", message)
    needed = None
    if found:
        number, unit = (group for group in found.groups() if group)
        needed = float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]
    first = message.strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return {"refused": first, "needed": needed}


def main(folder: Path) -> None:
    """Reads `request.json` of a folder, and writes `result.json` there."""
    jax.config.update("jax_enable_compilation_cache", False)  # not for devices that are not there
    request = json.loads((folder / "request.json").read_text())
    config = default()
    config.update(request["config"])
    try:
        topology = chips.parse(request["topology"])
        stands_in = as_accelerators_do() if topology.kind == "gpu" else contextlib.nullcontext()
        with stands_in:
            found = measure(config, topology, tuple(request["shape"]))
    except (TypeError, ValueError) as error:
        if os.environ.get("JAXDIFF_TRACEBACK"):
            raise
        found = {"error": str(error)}
    (folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
