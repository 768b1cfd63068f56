"""How fast it is: repeats taken in turn, medians and spreads, and ratios within one run.

    python -m experiments.benchmark train --size=digits
    python -m experiments.benchmark sample --size=mnist,cifar10 --kernels
    python -m experiments.benchmark sample --config=experiments/configs/mnist.py --batch_size=8
    python -m experiments.benchmark data
    python -m experiments.benchmark compile --size=cifar10
    python -m experiments.benchmark peers --python=ENVIRONMENT/bin/python

train     the training loop against its compiled steps alone
sample    the sampler against as many calls of the network
data      what pipelines of images deliver, against what training takes
compile   compilation, cold and from the cache; start-up
peers     against PyTorch with diffusers, of an environment of its own

No data set is needed. --json=FILE keeps all figures.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags
from ml_collections import config_flags

from experiments import (
    chips,
    estimate,
    kernels,
    peers,
    plan,
    programs,
    runs,
    runtime,
    sizes,
    timing,
    training_speed,
)
from experiments.sizes import Size

FLAGS = flags.FLAGS
# The flags that only some of the subcommands take.
ONLY = {
    "steps": ("sample", "peers", "compile"),
    "train_steps": ("train",),
    "kernels": ("train", "sample", "peers"),
    "python": ("peers",),
    "sides": ("peers",),
    "programs": ("peers",),
    "memory": ("peers",),
}


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    config_flags.DEFINE_config_file("config", None, "A configuration, instead of --size.")
    flags.DEFINE_list("size", list(sizes.NAMES), f"Networks: {', '.join(sizes.NAMES)}.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the network.")
    flags.DEFINE_integer("batch_size", None, "Examples at a time.", lower_bound=1)
    flags.DEFINE_integer("repeats", 7, "How often each side is timed.", lower_bound=1)
    flags.DEFINE_integer("warmup", 1, "How often before that, not to be counted.", lower_bound=0)
    flags.DEFINE_integer(
        "steps",
        None,
        "Steps of the sampler; if not given 50, but 10 for `sample` on CPU.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "train_steps",
        None,
        "Steps of a timed part of the loop; as many as take two seconds if not given.",
        lower_bound=1,
    )
    flags.DEFINE_bool("kernels", False, "Also the share of convolutions and matrix products.")
    flags.DEFINE_string("python", None, "The Python of an environment with PyTorch and diffusers.")
    flags.DEFINE_list("sides", list(peers.SIDES), "How PyTorch is to run it.")
    flags.DEFINE_list("programs", list(programs.MAKE), "What is to be compared.")
    flags.DEFINE_bool("memory", False, "Also the peak memory of a train step.")
    flags.DEFINE_string("json", None, "A file for all figures.")


def chosen_sizes(command: str) -> list[Size]:
    """Returns the sizes that flags ask for.

    Raises:
      ValueError: a flag is of another subcommand, or names what there is not.
    """
    for name, commands in ONLY.items():
        if FLAGS[name].present and command not in commands:
            raise ValueError(f"--{name} belongs to {' and '.join(commands)}, not to {command}")
    if FLAGS.config is None:
        found = [
            sizes.make(name, dtype=FLAGS.dtype, batch_size=FLAGS.batch_size) for name in FLAGS.size
        ]
    elif FLAGS["size"].present:
        raise ValueError("give --size or --config, not both")
    else:
        found = [Size(FLAGS.config, plan.example_shape(FLAGS.config))]
        if FLAGS["dtype"].present:
            found[0].config.model.dtype = FLAGS.dtype
        if FLAGS.batch_size:
            found[0].config.train.batch_size = FLAGS.batch_size
            found[0].config.sample.batch_size = FLAGS.batch_size
        found[0].config.data.shrink = 1  # the random images are of the size that it is trained on
    few = command == "sample" and jax.default_backend() == "cpu"
    for size in found:
        size.config.sample.steps = FLAGS.steps or (10 if few else 50)
    return found


def train() -> None:
    """Times train steps, and the loop around them."""
    rows, found = [], {}
    for size in chosen_sizes("train"):
        name = size.config.name
        with progress(f"train {name}", FLAGS.repeats + max(1, FLAGS.warmup)) as bar:
            step = programs.train(size)
            timing.seconds(step.call)
            one = timing.seconds(step.call)
            peak = runtime.memory().get("device_memory_peak")  # of one state yet
            count = FLAGS.train_steps or min(50, max(2, math.ceil(2 / one)))
            times = training_speed.loop_and_steps(
                size, step, count, repeats=FLAGS.repeats, warmup=FLAGS.warmup, tell=bar.update
            )
        each = timing.summary([taken / count for taken in times["steps"]])
        ratio = timing.ratio(times["steps"], times["loop"])
        figures = figures_of(size, step, each["median"])
        found[name] = {
            "run": described(size),
            "steps_in_a_part": count,
            "step": each,
            "loop": timing.summary([taken / count for taken in times["loop"]]),
            "speed_of_the_loop": ratio,
            "data": "grain" if training_speed.has_grain() else "one batch (no grain here)",
            "device_memory_peak": peak,
            **figures,
        }
        row = [name, step.batch_size, milliseconds(each), spread(ratio)]
        rows.append([*row, *in_words(figures, peak)])
        found[name]["kernels"] = kernel_shares(name, step, each["median"])
    show(["size", "batch", "step, ms", "loop, speed of its steps", *HEADS], rows)
    show_kernels("train", found)
    keep("train", found)


def sample() -> None:
    """Times the sampler, and the calls of the network that it makes."""
    rows, found = [], {}
    for size in chosen_sizes("sample"):
        name, steps = size.config.name, size.config.sample.steps
        with progress(f"sample {name}", 2 * (FLAGS.repeats + FLAGS.warmup)) as bar:
            draw, network = programs.sample(size), programs.forward(size)

            def calls(network: Any = network, steps: int = steps) -> float:
                return steps * timing.seconds(network.call, steps)

            def drawn(draw: Any = draw) -> float:
                return timing.seconds(draw.call)

            drawn(), timing.seconds(network.call)  # what a first call does is not timed
            times = timing.interleaved(
                {"sample": drawn, "calls": calls},
                repeats=FLAGS.repeats,
                warmup=FLAGS.warmup,
                tell=bar.update,
            )
        each, ratio = timing.summary(times["sample"]), timing.ratio(times["sample"], times["calls"])
        peak = runtime.memory().get("device_memory_peak")
        figures = figures_of(size, draw, each["median"])
        found[name] = {
            "run": described(size),
            "steps": steps,
            "sample": each,
            "network_calls": timing.summary(times["calls"]),
            "ratio": ratio,
            "device_memory_peak": peak,
            **figures,
        }
        row = [name, draw.batch_size, steps, milliseconds(each), spread(ratio)]
        rows.append([*row, *in_words(figures, peak)])
        found[name]["kernels"] = kernel_shares(name, draw, each["median"])
    show(["size", "batch", "steps", "sample, ms", "over network calls", *HEADS], rows)
    show_kernels("sample", found)
    keep("sample", found)


def compare() -> None:
    """Times programs here and in PyTorch, in turn."""
    # Two processes share a GPU, and JAX takes most of it unless told otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    for side in FLAGS.sides:
        if side not in peers.SIDES:
            raise ValueError(f"--sides must be of {', '.join(peers.SIDES)}, got {side!r}")
    for program in FLAGS.programs:
        programs.check_name(program)
    found: dict[str, Any] = {}
    rows = []
    with peers.Worker(FLAGS.python) as worker:
        for size in chosen_sizes("peers"):
            name = size.config.name
            about = peers.check(worker, size)
            found[name] = {"run": described(size), "peer": about, "programs": {}, "kernels": {}}
            for what in FLAGS.programs:
                count = (FLAGS.repeats + FLAGS.warmup) * (1 + len(FLAGS.sides))
                with progress(f"{what} {name}", count) as bar:
                    program = programs.make(what, size)
                    result = peers.compare(
                        worker,
                        size,
                        program,
                        what,
                        FLAGS.sides,
                        repeats=FLAGS.repeats,
                        warmup=FLAGS.warmup,
                        tell=bar.update,
                    )
                found[name]["programs"][what] = result
                rows.append([what, name, *peer_row(result)])
                say(" ".join(map(str, rows[-1])))
                ours = result["sides"]["jaxdiff"]
                if "median" in ours:
                    result |= figures_of(size, program, ours["median"])
                    found[name]["kernels"][what] = kernel_shares(
                        f"{what} {name}", program, ours["median"]
                    )
                del program
    show(
        ["program", "size", *(f"{s}, ms" for s in ("jaxdiff", *FLAGS.sides)), "best / jaxdiff"],
        rows,
    )
    for name, values in found.items():
        for what, result in values["programs"].items():
            for side, told in result["sides"].items():
                if "error" in told:
                    print(f"{what} {name}, {side}: {told['error']}")
    for name, values in found.items():
        show_kernels(name, {what: {"kernels": v} for what, v in values["kernels"].items()})
    keep("peers", found)


def peer_row(result: dict[str, Any]) -> list[str]:
    """Returns a row of the table: times of all sides, and the ratio."""
    times = [
        "failed" if "error" in side else milliseconds(side) for side in result["sides"].values()
    ]
    ahead = f"{spread(result['ratio'])} {result['best']}" if "ratio" in result else "-"
    return [*times, ahead]


HEADS = ("images/s", "FLOP/s", "of the peak", "memory")


def figures_of(size: Size, program: programs.Program, seconds: float) -> dict[str, Any]:
    """Returns what follows from the time of a call."""
    device = jax.devices()[0]
    chip = chips.of_kind(device.device_kind)
    peak = chip and (chip.float32 if size.config.model.dtype == "float32" else chip.bfloat16)
    speed = program.flops / seconds
    return {
        "images_per_second": program.batch_size / seconds,
        "flops": program.flops,
        "flops_per_second": speed,
        "share_of_peak": speed / (peak * jax.device_count()) if peak else None,
        "memory": program.memory,
    }


def in_words(figures: dict[str, Any], peak: int | None) -> list[str]:
    """Returns the same for a table, under `HEADS`."""
    share, needs = figures["share_of_peak"], sum(figures["memory"].values())
    memory = f"{estimate.in_bytes(peak)} at most" if peak else estimate.in_bytes(needs)
    return [
        f"{figures['images_per_second']:,.4g}",
        estimate.in_units(figures["flops_per_second"], "FLOP/s"),
        f"{100 * share:.1f} %" if share is not None else "-",
        memory,
    ]


def kernel_shares(name: str, program: programs.Program, whole: float) -> dict[str, Any] | None:
    """Returns what `kernels.shares` does, if asked for."""
    if not FLAGS.kernels:
        return None
    return kernels.shares(
        program,
        whole,
        repeats=FLAGS.repeats,
        tell=lambda left: say(f"{name}: {left} kernels left") if left % 10 == 0 else None,
    )


def show_kernels(title: str, found: dict[str, Any]) -> None:
    """Prints the tables of kernels, if there are any."""
    rows = [
        [
            name,
            kind,
            sums["count"],
            f"{1e3 * sums['seconds']:.4g}",
            f"{sums['flops'] / sums['seconds'] / 1e9:.4g}",
            f"{100 * sums['share']:.1f} %",
        ]
        for name, values in found.items()
        for kind, sums in (values.get("kernels") or {}).items()
    ]
    if rows:
        print(f"\nkernels of {title}, each timed alone")
        show(["of", "kind", "number", "ms", "GFLOP/s", "of the whole"], rows)


def described(size: Size) -> dict[str, Any]:
    """Returns what a reader must know of the machine and of what ran."""
    about = runs.describe(size.config, programs.count_parameters(size), size.shape)
    return about | {
        "model": runs.as_json(size.config)["model"],
        "compiler_options": runtime.compiler_options(),
        "cpu_count": os.cpu_count(),
    }


def milliseconds(found: dict[str, Any]) -> str:
    """Returns a median in ms, and from where to where it goes."""
    median, low, high = (1e3 * found[key] for key in ("median", "min", "max"))
    return f"{median:.4g} ({low:.4g}..{high:.4g})"


def spread(found: dict[str, Any]) -> str:
    """Returns a median ratio, and from where to where it goes."""
    return f"{found['median']:.3f} ({found['min']:.3f}..{found['max']:.3f})"


def show(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table."""
    lines = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def say(text: str) -> None:
    """Writes a line of progress, beside the table."""
    tqdm.tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[tqdm.tqdm]:
    """Shows how far the measurement is; where there is no terminal, that it has begun."""
    with tqdm.tqdm(total=total, desc=name, disable=None, leave=False) as bar:
        if bar.disable:
            say(f"{name} ...")
        yield bar


def keep(command: str, found: dict[str, Any]) -> None:
    """Writes all figures, if asked for."""
    if FLAGS.json:
        runs.write_json(Path(FLAGS.json), {command: found})
        print(f"wrote {FLAGS.json}")


MAIN: dict[str, Callable[[], None]] = {
    "train": train,
    "sample": sample,
    "peers": compare,
}

if __name__ == "__main__":
    runtime.command(define_flags, MAIN)
