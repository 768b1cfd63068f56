"""What sampling costs beyond the network: compile time, memory and the loop itself.

    python -m experiments.benchmark
    python -m experiments.benchmark --config=experiments/configs/digits.py --batch_size=64

Ratios are of times measured in one run, the two sides in turn; medians over the repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import build, drawing, runs, runtime
from jaxdiff.base import PyTree

FLAGS = flags.FLAGS
SHAPES = {"digits": (8, 8, 1), "mnist": (32, 32, 1), "fashion_mnist": (32, 32, 1)}


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs/mnist.py"))
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


def main() -> None:
    """Runs the command."""
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
