"""The compiled programs that benchmarks time, made as the experiments make them.

`forward`, one call of the network; `train`, a train step; `sample`, a batch of samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import build, drawing, packing, runtime
from experiments.sizes import Size
from jaxdiff.base import Array, PyTree
from jaxdiff.training import TrainState, sharding


class Program(NamedTuple):
    """A compiled program with something to work on.

    Attributes:
      call: runs it once; what it returns is not awaited.
      batch_size: how many examples a call is of.
      flops: of a call, on all devices together, as the compiler counts them in the whole program,
        before it makes kernels of it.
      memory: what the compiler says it needs on each device, bytes: "arguments", "outputs" (without
        those that take the place of arguments) and "temporaries".
      lines: of the program's text.
      times: seconds that it took to make: "lower_s", to trace and lower, and "compile_s".
      jaxpr: what was compiled.
      args: what it was compiled for.
    """

    call: Callable[[], Any]
    batch_size: int
    flops: float
    memory: dict[str, int]
    lines: int
    times: dict[str, float]
    jaxpr: Any
    args: tuple[Any, ...]


def make(name: str, size: Size) -> Program:
    """Returns a program by its name, a key of `MAKE`."""
    return build.choose("--programs", name, MAKE)(size)


def check_name(name: str) -> None:
    """Raises ValueError if there is no such program."""
    build.choose("--programs", name, MAKE)


def forward(size: Size) -> Program:
    """Returns a call of the network, on a batch of `sample.batch_size`."""
    config, count = size.config, size.config.sample.batch_size
    rows = sharding.rows(mesh_of(size, "sample"))
    network = build.in_parts(build.make_network(config, size.shape))
    labels = drawing.make_labels(config, 0, count)

    def call(params: PyTree, x: Array, t: Array) -> Array:
        return network(params, x, t, labels)

    x = np.random.default_rng(0).standard_normal((count, *size.shape), np.float32)
    steps = build.make_schedule(config).num_steps
    t = np.full(count, steps // 2, np.int32) if steps else np.full(count, 0.5, np.float32)
    jitted = jax.jit(call, out_shardings=rows, compiler_options=runtime.compiler_options())
    program = _program(jitted, (parameters(size), *sharding.from_rows((x, t), rows)), count)
    return program._replace(flops=program.flops * runtime.parts(x.shape))


def train(size: Size) -> Program:
    """Returns a train step; each call goes on from the one before."""
    mesh = mesh_of(size, "train")
    init, step, like = training(size)
    pack, _ = packing.for_training(like, mesh)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(
            sharding.fully_sharded(mesh, jax.eval_shape(pack, like)),
            sharding.everywhere(mesh),
        ),
        compiler_options=runtime.compiler_options(),
    )
    state = pack(jax.jit(init, out_shardings=sharding.fully_sharded(mesh, like))())
    batch = sharding.from_rows(host_batch(size), sharding.rows(mesh))
    program = _program(jitted, (state, None, batch), size.config.train.batch_size)
    one = program.call
    # The compiler counts once what each of several devices does by itself, and what is in a loop.
    times = (mesh.size if runtime.maps_devices(mesh) else 1) * max(
        _parts(size), size.config.train.microbatches
    )

    def call() -> Any:
        nonlocal state
        state, metrics = one(state, None, batch)
        return metrics

    return program._replace(call=call, flops=times * program.flops)


def sample(size: Size) -> Program:
    """Returns the sampler of `sample.steps` steps."""
    jitted = drawing.make_draw(size.config, size.shape)
    count = size.config.sample.batch_size
    program = _program(jitted, (parameters(size), 0), count)
    # The compiler counts what stands in a loop once.
    calls = size.config.sample.steps * runtime.parts((count, *size.shape))
    return program._replace(flops=program.flops * calls)


MAKE = {"forward": forward, "train": train, "sample": sample}


def mesh_of(size: Size, section: str) -> jax.sharding.Mesh:
    """Returns the mesh of all devices, which must divide the section's batches.

    Raises:
      ValueError: it does not.
    """
    mesh, count = build.make_mesh(size.config), size.config[section].batch_size
    if count % mesh.size:
        raise ValueError(
            f"a batch of {count} can't be divided among {mesh.size} devices: give another "
            "--batch_size"
        )
    return mesh


def training(
    size: Size,
) -> tuple[Callable[[], TrainState], Callable[..., Any], TrainState]:
    """Returns `init()`, the step `(state, held, batch)` of `loop.compile_step`, and the shapes."""
    mesh = build.make_mesh(size.config)
    init, step = build.make_training(
        size.config,
        size.shape,
        None,
        mesh,
        mapped=runtime.maps_devices(mesh),
        parts=_parts(size),
    )

    def step_of_batch(state: TrainState, held: Any, batch: PyTree) -> Any:
        return step(state, batch)

    return init, step_of_batch, jax.eval_shape(init)


def _parts(size: Size) -> int:
    return runtime.parts((size.config.train.batch_size, *size.shape), training=True)


def host_batch(size: Size) -> dict[str, np.ndarray]:
    """Returns a batch of noise for the train step, and labels if it takes some."""
    count = size.config.train.batch_size
    x0 = np.random.default_rng(0).uniform(-1, 1, (count, *size.shape)).astype(np.float32)
    classes = size.config.labels.num_classes
    return {"x0": x0} | ({"cond": np.arange(count, dtype=np.int32) % classes} if classes else {})


def parameters(size: Size) -> PyTree:
    """Returns parameters as of a trained network: none are 0, and values keep their size."""
    generator, like = np.random.default_rng(0), training(size)[2].params

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        values = generator.standard_normal(shape, np.float32)
        return values / math.sqrt(math.prod(shape[:-1])) if len(shape) > 1 else 1 + values / 10

    made = jax.tree.map(lambda a: leaf(a.shape).astype(a.dtype), like)
    return jax.device_put(made, sharding.everywhere(build.make_mesh(size.config)))


def count_parameters(size: Size) -> int:
    """Returns how many parameters the network has."""
    return sum(leaf.size for leaf in jax.tree.leaves(training(size)[2].params))


def with_changes(size: Size, changes: Mapping[str, Any]) -> Size:
    """Returns a size whose configuration is changed, as `ConfigDict.update` does."""
    config: ConfigDict = size.config.copy_and_resolve_references()
    config.update(changes)
    return size._replace(config=config)


def _program(jitted: Any, args: tuple[Any, ...], batch_size: int) -> Program:
    start = time.perf_counter()
    traced = jitted.trace(*args)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    times = {"lower_s": middle - start, "compile_s": time.perf_counter() - middle}
    needs = compiled.memory_analysis()
    memory = {
        "arguments": needs.argument_size_in_bytes,
        "outputs": needs.output_size_in_bytes - needs.alias_size_in_bytes,
        "temporaries": needs.temp_size_in_bytes,
    }
    lines = lowered.as_text().count("\n")
    flops = lowered.cost_analysis()["flops"]

    def call(*given: Any) -> Any:
        return compiled(*(given or args))

    return Program(call, batch_size, flops, memory, lines, times, traced.jaxpr, args)
