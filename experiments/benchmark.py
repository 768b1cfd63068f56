"""What sampling costs beyond the network, and training beyond its steps.

    python -m experiments.benchmark
    python -m experiments.benchmark --config=experiments/configs/digits.py --batch_size=64
    python -m experiments.benchmark --train

Of sampling: compile time, memory and the loop itself. `--train`: the training loop, with its data,
metrics and a checkpoint, against calls of the compiled train step one after the other on a batch
that is on the device already.

Ratios are of times measured in one run, the two sides in turn; medians over the repeats.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import build, drawing, loop, runs, runtime, train
from jaxdiff import data
from jaxdiff.base import PyTree
from jaxdiff.training import TrainState, checkpoints, sharding

FLAGS = flags.FLAGS
SHAPES = {"digits": (8, 8, 1), "mnist": (32, 32, 1), "fashion_mnist": (32, 32, 1)}


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs/mnist.py"))
    flags.DEFINE_bool("train", False, "The training loop, instead of sampling.")
    flags.DEFINE_integer("train_steps", 20, "Steps of the timed loop.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Samples at a time.", lower_bound=1)
    flags.DEFINE_integer("steps", 10, "Steps of the timed sampler.", lower_bound=1)
    flags.DEFINE_integer("repeats", 7, "How often each side is timed.", lower_bound=1)
    flags.DEFINE_string("out", None, "A file for the results, JSON.")


def sampler(config: ConfigDict, steps: int) -> Callable[..., Any]:
    """Returns the compiled sampler of the configuration, with so many steps."""
    config = config.copy_and_resolve_references()
    config.sample.steps = steps
    return drawing.make_draw(config, shape_of(config))


def shape_of(config: ConfigDict) -> tuple[int, ...]:
    """Returns the shape of one example; no data set is needed here."""
    return SHAPES.get(config.name, (32, 32, 3))


def parameters(config: ConfigDict) -> PyTree:
    """Returns parameters of the network; their values do not matter, but are not all 0."""
    init, _ = build.make_training(config, shape_of(config))
    shapes = jax.eval_shape(init).params
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)


def compile_costs(config: ConfigDict, params: PyTree) -> dict[str, Any]:
    """Returns compile time, program size and memory of the sampler, for 10 and 1000 steps."""
    found = {}
    for steps in (10, 1000):
        start = time.perf_counter()
        lowered = sampler(config, steps).lower(params, 0)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        found[f"{steps} steps"] = {
            "compile_s": time.perf_counter() - start,
            "program_lines": lowered.as_text().count("\n"),
            "temporaries_bytes": memory.temp_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
        }
    return found


def seconds(call: Callable[[], Any]) -> float:
    """Returns how long a call takes, its result awaited."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def loop_costs(config: ConfigDict, params: PyTree, steps: int, repeats: int) -> dict[str, Any]:
    """Returns the time of the sampler against as many single calls of the network."""
    shape = (config.sample.batch_size, *shape_of(config))
    model = build.make_model(config, shape[-1])
    network = jax.jit(lambda params, x, t: model.apply(params, x, t))
    x, t = jnp.ones(shape), jnp.full(shape[:1], 500)
    draw = sampler(config, steps)

    def calls() -> None:
        for _ in range(steps):
            jax.block_until_ready(network(params, x, t))

    sides: dict[str, Callable[[], Any]] = {"sample": lambda: draw(params, 0), "calls": calls}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()  # compiles
    for _ in tqdm.trange(repeats, desc="repeats", disable=None):
        for name, side in sides.items():
            times[name].append(seconds(side))
    ratios = [a / b for a, b in zip(times["sample"], times["calls"], strict=True)]
    return {
        "steps": steps,
        "repeats": repeats,
        "sample_s": statistics.median(times["sample"]),
        "network_calls_s": statistics.median(times["calls"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def training_costs(config: ConfigDict, steps: int, repeats: int) -> dict[str, Any]:
    """Returns the speed of the training loop as a share of that of its steps alone.

    The data are random images of the configuration's size, 10,000 of them.
    """
    size = shape_of(config)
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, *size), dtype=np.uint8)
    source = data.from_arrays(pixels, labels=np.zeros(len(pixels), np.int32))
    config = config.copy_and_resolve_references()
    config.train.num_steps = steps * (2 * repeats + 2)
    config.train.checkpoint_every, config.train.sample_every = steps * config.train.num_steps, 0
    mesh = build.make_mesh(config)
    stage = train.make_stage(config, config.train.num_steps, 0, source, mesh, None)
    places = sharding.fully_sharded(mesh, stage.like)
    state = jax.jit(stage.init, out_shardings=places)()
    place = sharding.rows(mesh)
    same = itertools.repeat(sharding.from_rows(next(stage.batches), place))

    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        runs.write_json(workdir / "config.json", runs.as_json(config))
        with (
            checkpoints.open_folder(workdir / "checkpoints") as saved,
            runs.Metrics(workdir, 0) as metrics,
        ):

            def looped(state: TrainState) -> TrainState:
                last = int(state.step) + steps
                return loop.run(
                    config, state, stage.advance, stage.batches, saved, metrics, last=last
                )

            def alone(state: TrainState) -> TrainState:
                return stage.advance(state, same, steps)[0]

            sides = {"loop": looped, "steps": alone}
            times: dict[str, list[float]] = {name: [] for name in sides}
            for repeat in tqdm.trange(repeats + 1, desc="repeats", disable=None):
                for name, side in sides.items():
                    start = time.perf_counter()
                    state = jax.block_until_ready(side(state))
                    if repeat:  # the first compiles
                        times[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(times["loop"], times["steps"], strict=True)]
    return {
        "steps": steps,
        "repeats": repeats,
        "batch_size": config.train.batch_size,
        "loop_s": statistics.median(times["loop"]),
        "steps_s": statistics.median(times["steps"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def tell_training(found: dict[str, Any]) -> None:
    """Prints what `training_costs` found."""
    print(
        f"{found['steps']} training steps of {found['batch_size']} examples: the loop "
        f"{found['loop_s']:.3f} s, the steps alone {found['steps_s']:.3f} s; speed of the loop "
        f"{found['ratio']:.3f} of theirs ({found['ratio_min']:.3f} to {found['ratio_max']:.3f})"
    )


def main() -> None:
    """Runs the command."""
    if FLAGS.train:
        found = training_costs(FLAGS.config, FLAGS.train_steps, FLAGS.repeats)
        tell_training(found)
        if FLAGS.out:
            runs.write_json(Path(FLAGS.out), {"train": found})
            print(f"wrote {FLAGS.out}")
        return
    jax.config.update("jax_enable_compilation_cache", False)  # it would hide the compile time
    config = FLAGS.config
    config.sample.batch_size = FLAGS.batch_size
    params = parameters(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    about = runs.describe(config, count, shape_of(config))
    print(f"{config.name}: {count:,} parameters, batch {FLAGS.batch_size}, {about['devices']}")

    costs = compile_costs(config, params)
    for name, values in costs.items():
        print(
            f"sample, {name:>10}: compiled in {values['compile_s']:.2f} s, "
            f"{values['program_lines']} lines, {values['temporaries_bytes'] / 2**20:.2f} MiB"
        )
    loop = loop_costs(config, params, FLAGS.steps, FLAGS.repeats)
    print(
        f"sample in {loop['steps']} steps: {loop['sample_s']:.3f} s; as many network calls: "
        f"{loop['network_calls_s']:.3f} s; ratio {loop['ratio']:.3f} "
        f"({loop['ratio_min']:.3f} to {loop['ratio_max']:.3f})"
    )
    if FLAGS.out:
        runs.write_json(Path(FLAGS.out), {"run": about, "compile": costs, "loop": loop})
        print(f"wrote {FLAGS.out}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
