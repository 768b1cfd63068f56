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

from experiments import build, chips, drawing, hlo, packing, runtime
from experiments.config import default
from jaxdiff.base import PyTree
from jaxdiff.training import TrainState, sharding


def devices_of(topology: chips.Topology) -> Sequence[Any]:
    """Returns the devices of a topology, to be compiled for.

    Those of a TPU slice need libtpu, but no TPU; GPUs need JAX's plugin for CUDA, but no GPU.
    Without it, and for others, as many CPU devices stand in, which must not have been started yet.
    """
    if topology.kind == "gpu" and chips.compiles_for_gpus():
        jax.devices("cpu")  # finds the plugin
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=chips.gpu_target(topology.name),
            topology=f"1x1x{topology.devices}",
        ).devices
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
        pack, _ = packing.for_training(like, mesh)
        packed = jax.eval_shape(pack, like)
        places = sharding.fully_sharded(mesh, packed)
        compiled_step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(places, sharding.everywhere(mesh)),
            compiler_options=runtime.compiler_options(),
        )
        state = sharding.placed(packed, places)
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
        parts = runtime.parts((config.sample.batch_size, *shrunk))
        found["sample"] = compiled_costs(
            f"the sampler for {where}",
            *samplers(stage, shrunk, mesh),
            (sharding.placed(like.ema, sharding.fully_sharded(mesh, like.ema)), 0),
            passes=parts * (drawing.make_grid(stage).sigma.shape[0] - 1),
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
        compiler_options=runtime.compiler_options(),
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
        return {**out_of_memory(str(error)), "flops": passes * _flops(plain, args)}
    print(f"plan: compiled {what} in {time.perf_counter() - start:.0f} s", flush=True)
    found = costs(compiled, passes)
    return found if "flops" in found else {"flops": passes * _flops(plain, args), **found}


def _flops(plain: Any, args: tuple[Any, ...]) -> float:
    """Returns a device's share of the whole program, before that is divided and fused."""
    with as_accelerators_do():
        whole = jax.jit(plain).lower(*jax.tree.map(_unplaced, args)).cost_analysis()
    return whole["flops"] / jax.tree.leaves(args)[0].sharding.num_devices


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
      memory. Of GPUs that are not there the compiler does not count: "flops" are missing, "bytes"
      are `hlo.traffic`'s, and "kernels" says how many there are.
    """
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    if cost is None:
        counted = hlo.traffic(text, passes)._asdict()
    else:
        counted = {"flops": passes * cost["flops"], "bytes": passes * cost["bytes accessed"]}
    return counted | {
        "between_devices": hlo.collective_bytes(text, passes),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


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
        stands_in = topology.kind == "gpu" and not chips.compiles_for_gpus()
        network = as_accelerators_do() if stands_in else contextlib.nullcontext()
        with runtime.made_for(topology.kind), network:
            found = measure(config, topology, tuple(request["shape"]))
    except (TypeError, ValueError) as error:
        if os.environ.get("JAXDIFF_TRACEBACK"):
            raise
        found = {"error": str(error)}
    (folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
