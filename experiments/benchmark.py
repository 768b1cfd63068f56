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
peers     against PyTorch with diffusers, of an environment of its own; a CPU is as many devices as
          each program likes, unless --cpu_devices says otherwise

No data set is needed. --json=FILE keeps all figures.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments import (
    build,
    figures,
    fresh,
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
    "warmup": ("train", "sample", "data", "peers"),
    "steps": ("sample", "peers"),
    "train_steps": ("train",),
    "kernels": ("train", "sample", "peers"),
    "python": ("peers",),
    "sides": ("peers",),
    "programs": ("peers",),
    "memory": ("peers",),
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    config_flags.DEFINE_config_file(
        "config", None, "A configuration, instead of --size.", flag_values=values
    )

    def whole(name: str, text: str, default: int | None = None, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)

    def names(name: str, among: Any, text: str, default: Any = None) -> None:
        text = f"{text}: {','.join(among)}."
        flags.DEFINE_list(name, list(default or among), text, flag_values=values)

    names("size", sizes.NAMES, "Networks", sizes.SMALL)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Of the network.", flag_values=values
    )
    whole("batch_size", "Examples at a time; if not given, as the backend likes it.")
    whole("repeats", "How often each side is timed; if not given 7 times, but compiled once.")
    whole("warmup", "How often before that, not to be counted.", 1, 0)
    whole("steps", "Steps of the sampler; if not given 50, but 10 for `sample` on CPU.")
    whole("train_steps", "Steps of a timed part of the loop; if not given, for two seconds.")
    flags.DEFINE_bool(
        "kernels", False, "Also the share of convolutions and products.", flag_values=values
    )
    flags.DEFINE_string(
        "python", None, "The Python of an environment with PyTorch.", flag_values=values
    )
    names("sides", peers.SIDES, "How PyTorch is to run it")
    names("programs", programs.MAKE, "What is to be compared")
    flags.DEFINE_bool(
        "memory",
        False,
        "Also the peak memory of train steps, with activations kept and computed anew.",
        flag_values=values,
    )
    flags.DEFINE_string("json", None, "A file for all figures.", flag_values=values)


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
    found = {}
    for size in chosen_sizes("train"):
        name = size.config.name
        with figures.progress(f"train {name}", repeats() + max(1, FLAGS.warmup)) as bar:
            step = programs.train(size)
            timing.seconds(step.call)
            one = timing.seconds(step.call)
            peak = runtime.memory().get("device_memory_peak")  # of one state yet
            count = FLAGS.train_steps or min(50, max(2, math.ceil(2 / one)))
            times = training_speed.loop_and_steps(
                size, step, count, repeats=repeats(), warmup=FLAGS.warmup, tell=bar.update
            )
        each = timing.summary([taken / count for taken in times["steps"]])
        found[name] = {
            "run": figures.described(size),
            "steps_in_a_part": count,
            "step": each,
            "loop": timing.summary([taken / count for taken in times["loop"]]),
            "speed_of_the_loop": timing.ratio(times["steps"], times["loop"]),
            "data": "grain" if training_speed.has_grain() else "one batch (no grain here)",
            "device_memory_peak": peak,
            **figures.of(size, step, each["median"]),
            "kernels": kernel_shares(name, step, each["median"]),
        }
        keep("train", found)
    figures.show_training(found)
    figures.show_kernels("train", found)


def sample() -> None:
    """Times the sampler, and the calls of the network that it makes."""
    found = {}
    for size in chosen_sizes("sample"):
        name, steps = size.config.name, size.config.sample.steps
        with figures.progress(f"sample {name}", 2 * (repeats() + FLAGS.warmup)) as bar:
            draw, network = programs.sample(size), programs.forward(size)

            def calls(network: Any = network, steps: int = steps) -> float:
                return steps * timing.seconds(network.call, steps)

            def drawn(draw: Any = draw) -> float:
                return timing.seconds(draw.call)

            drawn(), timing.seconds(network.call)  # what a first call does is not timed
            times = timing.interleaved(
                {"sample": drawn, "calls": calls},
                repeats=repeats(),
                warmup=FLAGS.warmup,
                tell=bar.update,
            )
        each = timing.summary(times["sample"])
        found[name] = {
            "run": figures.described(size),
            "steps": steps,
            "sample": each,
            "network_calls": timing.summary(times["calls"]),
            "ratio": timing.ratio(times["sample"], times["calls"]),
            "device_memory_peak": runtime.memory().get("device_memory_peak"),
            **figures.of(size, draw, each["median"]),
            "kernels": kernel_shares(name, draw, each["median"]),
        }
        keep("sample", found)
    figures.show_sampling(found)
    figures.show_kernels("sample", found)


def data() -> None:
    """Times what makes batches, against the train steps that take them."""
    if not training_speed.has_grain():
        print('Grain is not installed here (pip install "jaxdiff[data]"): there is no pipeline')
        return
    found = {}
    for size in chosen_sizes("data"):
        name = size.config.name
        with figures.progress(f"data {name}", 3 * (repeats() + FLAGS.warmup)) as bar:
            step = programs.train(size)
            sides = training_speed.data_sides(size)
            both = sides | {"train": lambda times, step=step: timing.seconds(step.call, times)}
            times = timing.interleaved(
                {side: timing.calibrated(run, 0.5) for side, run in both.items()},
                repeats=repeats(),
                warmup=FLAGS.warmup,
                tell=bar.update,
            )
        found[name] = {
            "run": figures.described(size),
            "batch_size": step.batch_size,
            **{side: timing.summary(each) for side, each in times.items()},
            **{f"{side}_ratio": timing.ratio(times["train"], times[side]) for side in sides},
        }
        keep("data", found)
    figures.show_data(found)


def compilation() -> None:
    """Times compilation, in fresh processes with a cache of their own, and imports."""
    # This process leaves a GPU's memory to those.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = {}
    for size in chosen_sizes("compile"):
        name = size.config.name
        found[name] = {"run": figures.described(size), "programs": {}}
        for what, steps in (("train", None), ("sample", 10), ("sample", 1000)):
            label = f"{what}, {steps} steps" if steps else what
            with figures.progress(f"compile {name}, {label}", 2 * repeats(few=1)) as bar:
                found[name]["programs"][label] = fresh.compile_times(
                    programs.with_changes(size, {"sample": {"steps": steps}} if steps else {}),
                    what,
                    cpu_devices=runtime.cpu_devices(),
                    repeats=repeats(few=1),
                    tell=bar.update,
                )
        keep("compile", found)
    with figures.progress("imports", 2 * (repeats() + 1)) as bar:
        found["imports"] = fresh.import_times(repeats(), bar.update)
    keep("compile", found)
    figures.show_compilation(found)


def repeats(few: int = 7) -> int:
    """Returns how often to measure: as asked for, or else `few`."""
    return FLAGS.repeats or few


def compare() -> None:
    """Times programs here and in PyTorch, in turn."""
    for side in FLAGS.sides:
        build.choose("--sides", side, dict.fromkeys(peers.SIDES))
    for program in FLAGS.programs:
        programs.check_name(program)
    apart = FLAGS.config is None and runtime.cpu_devices() is None
    found = compare_apart() if apart else compare_here()
    figures.show_peers(found)
    for name, values in found.items():
        figures.show_kernels(name, {what: {"kernels": v} for what, v in values["kernels"].items()})
    if FLAGS.memory:
        figures.show_memory(found)


def compare_apart() -> dict[str, Any]:
    """Compares each program in a process of its own, with the CPU as the devices that it likes."""
    found: dict[str, Any] = {}
    for name, what in itertools.product(FLAGS.size, FLAGS.programs):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            own = {  # the last one of a flag counts
                "size": name,
                "programs": what,
                "cpu_devices": sizes.cpu_devices(name, what),
                "memory": FLAGS.memory and what == FLAGS.programs[-1],
                "json": path,
            }
            own = [f"--{flag}={value}" for flag, value in own.items()]
            done = subprocess.run(
                [sys.executable, "-m", "experiments.benchmark", *sys.argv[1:], *own],
                stdout=subprocess.DEVNULL,
                check=False,
            )
            if done.returncode:  # it has said why
                sys.exit(done.returncode)
            each = json.loads(path.read_text())["peers"][name]
        before = found.setdefault(name, each)
        for part in ("programs", "kernels"):
            before[part] |= each[part]
        before |= {key: value for key, value in each.items() if key == "memory"}
        keep("peers", found)
    return found


def compare_here() -> dict[str, Any]:
    """Compares all sizes in this process."""
    # Two processes share a GPU, and JAX takes most of it unless told otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    found: dict[str, Any] = {}
    with peers.Worker(FLAGS.python) as worker:
        for size in chosen_sizes("peers"):
            name = size.config.name
            about = peers.check(worker, size)
            found[name] = {
                "run": figures.described(size),
                "peer": about,
                "programs": {},
                "kernels": {},
            }
            for what in FLAGS.programs:
                count = (repeats() + FLAGS.warmup) * (1 + len(FLAGS.sides))
                with figures.progress(f"{what} {name}", count) as bar:
                    program = programs.make(what, size)
                    result = peers.compare(
                        worker,
                        size,
                        program,
                        what,
                        FLAGS.sides,
                        repeats=repeats(),
                        warmup=FLAGS.warmup,
                        pause=peers.PAUSE,
                        tell=bar.update,
                    )
                figures.say(" ".join([what, name, *figures.peer_row(result)]))
                result["devices"] = jax.device_count()
                ours = result["sides"]["jaxdiff"].get("median")
                if ours:
                    result |= figures.of(size, program, ours)
                    found[name]["kernels"][what] = kernel_shares(f"{what} {name}", program, ours)
                found[name]["programs"][what] = result
                keep("peers", found)
                del program
    if FLAGS.memory:
        measure_memory(found)
    return found


def measure_memory(found: dict[str, Any]) -> None:
    """Measures the memory of train steps, in a fresh process each, and adds it to what is found."""
    for size in chosen_sizes("peers"):
        name = size.config.name
        with figures.progress(f"memory {name}", 2 + 2 * len(FLAGS.sides)) as bar:
            found[name]["memory"] = peers.memory(
                FLAGS.python, size, FLAGS.sides, cpu_devices=runtime.cpu_devices(), tell=bar.update
            )
        keep("peers", found)


def kernel_shares(name: str, program: programs.Program, whole: float) -> dict[str, Any] | None:
    """Returns what `kernels.shares` does, if asked for."""
    if not FLAGS.kernels:
        return None
    return kernels.shares(
        program,
        whole,
        repeats=repeats(),
        tell=lambda left: figures.say(f"{name}: {left} kernels left") if left % 10 == 0 else None,
    )


def keep(command: str, found: dict[str, Any]) -> None:
    """Writes all figures so far, if asked for."""
    if FLAGS.json:
        runs.write_text(Path(FLAGS.json), json.dumps({command: found}, indent=2) + "\n")


MAIN: dict[str, Callable[[], None]] = {
    "train": train,
    "sample": sample,
    "data": data,
    "compile": compilation,
    "peers": compare,
}

if __name__ == "__main__":
    runtime.command(define_flags, MAIN)
