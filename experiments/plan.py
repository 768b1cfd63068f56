"""Plans a run without the hardware: does it fit, and how long will it take at best?

    python -m experiments.plan --config=experiments/configs/cifar10.py --topology=v5e:4x4
    python -m experiments.plan --config=experiments/configs/images_256.py --topology=gpu:8xH100

The real train step and sampler are compiled ahead of time. For TPUs that needs `libtpu` (the extra
`plan`), and no TPU; for GPUs as many CPU devices stand in. A large network takes minutes.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import build, chips, runs, runtime

FLAGS = flags.FLAGS
SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion_mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
    "svhn_cropped": (32, 32, 3),
}
"""Of data sets that need not be there, the shape of one image."""
ROOT = Path(__file__).parents[1]


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs/digits.py"))
    flags.DEFINE_string("topology", "", "The devices: v5e:4x4, gpu:8xA100-80GB, cpu:8, ...")
    flags.DEFINE_list("shape", None, "The shape of one example, 256,256,3, where not known.")
    flags.DEFINE_string("json", None, "A file for all figures.")


def example_shape(config: ConfigDict, given: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Returns the shape of one image, `(H, W, C)`; the data need not be there.

    Args:
      config: the configuration.
      given: the shape, if it is not to be found out.

    Raises:
      ValueError: the data are not images, or of unknown shape.
    """
    options = config.data
    if build.is_table(config):
        raise ValueError(f"plan is for images, and data.name={options.name} is a table")
    if given:
        return given
    if options.name == "folder" and options.size:
        shape: tuple[int, ...] = (options.size, options.size, 3)
    elif options.name in SHAPES:
        shape = SHAPES[options.name]
    else:
        raise ValueError(
            f"the shape of one image of data.name={options.name} is not known here: give it, as "
            "in --shape=256,256,3"
        )
    *spatial, channels = shape
    return (*((options.pad_to or side) for side in spatial), channels)


def check(config: ConfigDict, topology: chips.Topology) -> None:
    """Checks what needs no compiler.

    Raises:
      ImportError: libtpu is needed and not installed.
      ValueError: the batch can't be divided among the devices.
    """
    if topology.kind == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            'to compile for TPUs takes libtpu: pip install "jaxdiff[plan]", or plan for gpu: or '
            "cpu: devices"
        )
    size = config.train.batch_size
    if size % topology.devices:
        raise ValueError(
            f"train.batch_size is that of all devices together and must be a multiple of their "
            f"number, {topology.devices}, got {size}: try --config.train.batch_size="
            f"{-(-size // topology.devices) * topology.devices}"
        )


def measure(config: ConfigDict, topology: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns what `ahead.measure` finds, in a process of its own.

    What the compiler prints there is shown only if it fails.

    Raises:
      RunError: the process failed.
      ValueError: the configuration makes no sense.
    """
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # nobody to ask which TPU this is
        TPU_WORKER_HOSTNAMES="localhost",
        # The number of stand-ins is the topology's.
        XLA_FLAGS=re.sub(
            r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
        ),
    )
    with tempfile.TemporaryDirectory(prefix="jaxdiff-plan-") as name, tempfile.TemporaryFile(
        "w+"
    ) as noise:
        folder = Path(name)
        runs.write_json(folder / "config.json", runs.as_json(config))
        runs.write_json(folder / "request.json", {"topology": topology, "shape": list(shape)})
        command = [sys.executable, "-m", "experiments.ahead", name]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=noise, text=True
        ) as process:
            try:
                for line in process.stdout or ():
                    if line.startswith("plan: "):
                        print(line.removeprefix("plan: "), end="", flush=True)
                    else:
                        noise.write(line)
                status = process.wait()
            finally:
                process.kill()
        if status or not (folder / "result.json").exists():
            noise.seek(0)
            tail = "".join(noise.readlines()[-15:])
            raise runs.RunError(f"compiling for {topology} failed with status {status}:\n{tail}")
        found = runs.read_json(folder / "result.json")
    if "error" in found:
        raise ValueError(found["error"])
    return found


def usable_memory(topology: chips.Topology) -> float | None:
    """Returns the bytes that a program may use of a device's memory, or None for CPUs."""
    if topology.chip is None:
        return None
    if topology.kind == "gpu":  # JAX takes this part of it on starting
        return topology.chip.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return topology.chip.memory


def roofline(costs: Mapping[str, float], chip: chips.Chip, dtype: str) -> tuple[float, str]:
    """Returns the least time of a program on a device, seconds, and what bounds it.

    The longer of its arithmetic at the peak rate and its reading and writing of memory at the full
    bandwidth (Williams, Waterman & Patterson 2009).
    """
    arithmetic = costs["flops"] / (chip.float32 if dtype == "float32" else chip.bfloat16)
    moving = costs.get("bytes", 0) / chip.bandwidth
    return max(arithmetic, moving), "arithmetic" if arithmetic >= moving else "memory"


def assess(config: ConfigDict, topology: chips.Topology, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what follows from the figures: memory needed, whether it fits, times at best.

    Args:
      config: the configuration.
      topology: the devices.
      found: what `measure` returns.

    Returns:
      "needed" and "needed_sampling", bytes on each device, "usable", "fits" (None for CPUs) and
      "try", advice; and, but for CPUs, "step_seconds", "run_hours", "sample_seconds" (of
      `sample.num`) with "step_bound" and "sample_bound".
    """
    train, sample = found["train"], found.get("sample")
    state = sum(found["state"].values())
    usable = usable_memory(topology)
    result: dict[str, Any] = {"usable": usable, "fits": None, "try": []}
    if "out_of_memory" in train:
        result["needed"] = train["out_of_memory"]["bytes"]
    else:
        result["needed"] = _total(train)
    if sample:
        # The state stays where it is while pictures are drawn.
        there = train.get("arguments", state + found["batch"])
        if "out_of_memory" in sample:
            result["needed_sampling"] = sample["out_of_memory"]["bytes"]
        else:
            result["needed_sampling"] = there + _total(sample) - sample["arguments"]
    if usable is not None:
        refused = [name for name in ("train", "sample") if "out_of_memory" in found.get(name, {})]
        needs = (result["needed"] or 0, result.get("needed_sampling") or 0)
        result["fits"] = not refused and max(needs) <= usable
        if not result["fits"]:
            result["try"] = list(advice(config, topology, found, result))
    if topology.chip is not None:
        times = _times(config, topology.chip, found)
        result |= times
    return result


def _total(costs: Mapping[str, float]) -> float:
    """Returns the bytes of memory that a device needs to run a program."""
    return (
        costs["arguments"]
        + costs["outputs"]
        - costs["aliased"]
        + costs["temporaries"]
        + costs["program"]
    )


def _times(config: ConfigDict, chip: chips.Chip, found: Mapping[str, Any]) -> dict[str, Any]:
    dtype, train, sample = config.model.dtype, found["train"], found.get("sample")
    seconds, bound = roofline(train, chip, dtype)
    # The compiler counts what stands in a loop once: here microbatches, and a sampler's steps.
    seconds *= found.get("microbatches", 1)
    result = {
        "step_seconds": seconds,
        "step_bound": bound,
        "run_hours": seconds * config.train.num_steps / 3600,
    }
    if sample and "out_of_memory" not in sample:
        seconds, bound = roofline(sample, chip, dtype)
        batches = math.ceil(config.sample.num / config.sample.batch_size)
        result |= {"sample_seconds": seconds * sample["steps"] * batches, "sample_bound": bound}
    return result


def advice(
    config: ConfigDict,
    topology: chips.Topology,
    found: Mapping[str, Any],
    result: Mapping[str, Any],
) -> Iterator[str]:
    """Yields what to try where a run does not fit, what helps by itself first."""
    usable, state = result["usable"], sum(found["state"].values())
    needed = result["needed"]
    if needed is not None and needed <= usable and "out_of_memory" not in found["train"]:
        free = usable - found["train"]["arguments"]
        drawing = (result["needed_sampling"] or math.inf) - found["train"]["arguments"]
        size = int(config.sample.batch_size * free / drawing)
        size -= size % topology.devices if size > topology.devices else 0
        yield f"--config.sample.batch_size={max(1, size)}, as training alone fits"
        return
    rest = None if needed is None else max(0, needed - state)
    by_fsdp = {int(key): value for key, value in found["state_by_fsdp"].items()}
    least = min(by_fsdp.values(), default=state)
    enough = [f for f in sorted(by_fsdp) if rest is not None and by_fsdp[f] + rest <= usable]
    fsdp = enough[0] if enough else min(by_fsdp, key=lambda f: (by_fsdp[f], f), default=1)
    if by_fsdp.get(fsdp, state) < state:
        share = f"the state is then {size_text(by_fsdp[fsdp])} on a chip, and not"
        yield f"--config.mesh.fsdp={fsdp}: {share} {size_text(state)}"
    if enough:
        return
    if not config.model.remat:
        yield "--config.model.remat=True: activations are computed anew on the way back"
    local = config.train.batch_size // topology.devices
    parts = next(
        (k for k in _divisors(local)[1:] if rest is not None and rest / k <= usable - least), None
    )
    if parts:
        yield (
            f"--config.train.microbatches={parts}: temporaries are then about {size_text(rest / parts)}"
        )
    elif local > 1:
        yield f"--config.train.batch_size={topology.devices}, one example on a chip"
    if least >= usable:
        yield f"more chips, or larger ones: the state alone takes {size_text(least)} on each"


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def size_text(number: float) -> str:
    """Returns bytes as text, in the largest unit that leaves a whole one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            break
        number /= 1024
    else:
        number, unit = number / 1, "TiB"
    return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
