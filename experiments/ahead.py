"""Compiles the programs of a configuration for devices that are not there, and measures them.

`experiments.plan` starts this in a process of its own, `python -m experiments.ahead FOLDER`: what a
compiler loads and prints then stays out of the way.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import build, chips, drawing, runs, runtime
from experiments.config import default
from jaxdiff.base import PyTree

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
    """Compiles the train step and the sampler, and returns what they need.

    Args:
      config: the configuration, of images.
      topology: the devices.
      shape: of one example, `(*spatial, C)`.

    Returns:
      What JSON holds: "parameters", "mesh", "state" and "batch" (bytes of each device),
      "state_by_fsdp", and of "train" and "sample" what `costs` returns, or, where the program does
      not fit a TPU, "out_of_memory" with what the compiler says.
    """
    devices = devices_of(topology)
    mesh = make_mesh(config, devices)
    init, step = build.make_training(config, shape)
    like = jax.eval_shape(init)
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    state = placed(like, shardings(mesh, like))
    batch = abstract_batch(config, shape, rows)
    found: dict[str, Any] = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(like.params)),
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "state": state_bytes(state),
        "state_by_fsdp": {},
        "batch": bytes_per_device(batch),
    }
    where = f"{len(devices)} x {devices[0].device_kind}"
    options = runtime.compiler_options() if topology.kind == "cpu" else None
    step = jax.jit(step, donate_argnums=0, compiler_options=options)
    found["train"] = compiled_costs(f"the train step for {where}", step, state, batch)
    if "out_of_memory" in found["train"]:
        # Of the whole program, before it is divided and fused: its bytes would mean nothing.
        flops = step.lower(like, jax.tree.map(bare, batch)).cost_analysis()["flops"]
        found["train"]["flops"] = flops / len(devices)
    if config.sample.num:
        draw = drawing.make_draw(config, shape).__wrapped__
        whole = config.sample.batch_size % len(devices) == 0
        draw = jax.jit(draw, out_shardings=rows if whole else None)
        found["sample"] = compiled_costs(f"the sampler for {where}", draw, state.ema, 0)
        found["sample"]["steps"] = drawing.make_grid(config).sigma.shape[0] - 1
    return found


def make_mesh(config: ConfigDict, devices: Sequence[Any]) -> Mesh:
    return Mesh(np.array(devices), ("data",))


def shardings(mesh: Mesh, like: PyTree) -> PyTree:
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), like)


def placed(like: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, shardings
    )


def bare(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns shape and type without the sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def abstract_batch(config: ConfigDict, shape: tuple[int, ...], rows: NamedSharding) -> PyTree:
    """Returns shapes and types of a batch of images, as the train step is given them."""
    size = config.train.batch_size
    batch = {"x0": jax.ShapeDtypeStruct((size, *shape), jnp.float32, sharding=rows)}
    if config.labels.num_classes:
        batch["cond"] = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows)
    return batch


def bytes_per_device(tree: PyTree) -> int:
    """Returns how many bytes of a pytree of shapes with shardings lie on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def state_bytes(state: PyTree) -> dict[str, int]:
    """Returns the bytes on each device of the parts of the training state."""
    parts = {"parameters": state.params, "optimiser": state.opt_state, "EMA": state.ema}
    found = {name: bytes_per_device(part) for name, part in parts.items()}
    return found | {"other": bytes_per_device(state) - sum(found.values())}


def compiled_costs(what: str, function: Any, *args: PyTree) -> dict[str, Any]:
    """Compiles a function for its abstract arguments, and returns what it costs or why it can't."""
    print(f"plan: compiling {what}", flush=True)
    start = time.perf_counter()
    try:
        compiled = function.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"out_of_memory": out_of_memory(str(error))}
    seconds = time.perf_counter() - start
    print(f"plan: compiled {what} in {seconds:.0f} s", flush=True)
    return {**costs(compiled), "compile_seconds": seconds}


def costs(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Returns what a compiled program costs on each device.

    "flops" and "bytes" (read from and written to memory, as the compiler counts them) are of one
    pass through the program: what stands in a loop is counted once. "arguments", "outputs",
    "aliased" (outputs that take the place of arguments), "temporaries" and "program" are bytes of
    memory; "between_devices" are bytes of the results of collectives.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "between_devices": collective_bytes(compiled.as_text()),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def collective_bytes(text: str) -> int:
    """Returns the bytes of the results of all collectives in the text of a compiled program.

    An operation that is started and awaited, or stands in several fusions, is counted once, by its
    channel.
    """
    found: dict[str, int] = {}
    names = "|".join(COLLECTIVES)
    operation = re.compile(rf"= (.*?) (?:{names})(-start)?\(.*?(?:channel_id=(\d+)|$)", re.MULTILINE)
    for number, match in enumerate(operation.finditer(text)):
        shapes, started, channel = match.groups()
        sizes = [_bytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)]
        # The result of one that is started may hold its operands, too.
        size = max(sizes, default=0) if started else sum(sizes)
        name = channel or f"operation {number}"
        found[name] = max(found.get(name, 0), size)
    return sum(found.values())


def _bytes(dtype: str, sides: str) -> int:
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8


def out_of_memory(message: str) -> dict[str, Any]:
    """Returns the first line of what the compiler says, and the bytes it names as needed."""
    line = message.strip().splitlines()[0]
    found = re.search(r"Used ([\d.]+)([KMGT])|\(([\d.]+)([KMGT])\) exceeds", message)
    needed = None
    if found:
        number, unit = (group for group in found.groups() if group)
        needed = float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]
    return {"message": line.removeprefix("RESOURCE_EXHAUSTED: "), "bytes": needed}


def main(folder: Path) -> None:
    """Reads `config.json` and `request.json` of a folder, and writes `result.json` there."""
    jax.config.update("jax_enable_compilation_cache", False)  # not for devices that are not there
    request = json.loads((folder / "request.json").read_text())
    try:
        config = runs.load_config(folder, default())
        found = measure(config, chips.parse(request["topology"]), tuple(request["shape"]))
    except runtime.MENDABLE as error:
        found = {"error": str(error)}
    runs.write_json(folder / "result.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
