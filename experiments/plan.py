"""Plans a run without the hardware: does it fit, and about how long will it take?

    python -m experiments.plan --config=experiments/configs/cifar10.py --topology=v5e:4x4
    python -m experiments.plan --config=experiments/configs/images_256.py --topology=gpu:8xH100

The real train step and sampler are compiled ahead of time. For TPUs that needs `libtpu` (the extra
`plan`), and no TPU; for GPUs JAX's plugin for CUDA (the extra `cuda`), and no GPU, or else as many
CPU devices stand in. A large network takes minutes.
"""

from __future__ import annotations

import importlib.util
import json
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

from experiments import build, chips, estimate, runs, runtime

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
      ValueError: a batch can't be divided among the devices.
    """
    if topology.kind == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            'to compile for TPUs takes libtpu: pip install "jaxdiff[plan]"; or plan for GPUs or '
            "CPUs"
        )
    parts = topology.devices * config.train.microbatches
    for stage, _ in build.stages(config):
        size = stage.train.batch_size
        if size % parts:
            raise ValueError(
                f"train.batch_size is that of all devices together and must be a multiple of their "
                f"number, {topology.devices}, times train.microbatches="
                f"{config.train.microbatches}, got {size}: try {-(-size // parts) * parts}"
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
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nor one to be held by one process alone
        # The number of stand-ins is the topology's.
        XLA_FLAGS=re.sub(
            r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
        ),
    )
    with (
        tempfile.TemporaryDirectory(prefix="jaxdiff-plan-") as name,
        tempfile.TemporaryFile("w+") as noise,
    ):
        folder = Path(name)
        request = {"config": runs.as_json(config), "topology": topology, "shape": shape}
        (folder / "request.json").write_text(json.dumps(request))
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
        found = json.loads((folder / "result.json").read_text())
    if "error" in found:
        raise ValueError(found["error"])
    return found


def lines(
    config: ConfigDict,
    topology: chips.Topology,
    found: Mapping[str, Any],
    result: Mapping[str, Any],
) -> Iterator[str]:
    """Yields what is printed of `ahead.measure`'s figures and `estimate.assess`'s."""
    mesh = ", ".join(f"{name}={size}" for name, size in found["mesh"].items())
    yield f"{config.name}: {found['parameters']:,} parameters, {config.model.dtype}"
    yield f"{topology.devices} devices, {topology.name}; mesh {mesh}"
    if topology.name in chips.TWO_DEVICES_A_CHIP:
        yield "A chip of this kind is two devices: all figures are of half a chip."
    if topology.kind == "gpu":
        if found["device_kind"] != "cpu":
            yield (
                "Compiled for this GPU, where no kernel could be tried out: what the fastest "
                "convolutions take for\nthemselves is not in the temporaries."
            )
        else:
            yield (
                "Compiled for as many CPU devices: temporaries, and what is read and written, are "
                "as the CPU's compiler\nlays them out, and will differ (the extra cuda compiles "
                "for GPUs without one)."
            )
        yield "Of the memory counts what JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION)."
    yield from ("", "memory of a device")
    yield from memory_lines(found, result)
    for i, stage in enumerate(found["stages"]):
        yield from ("", f"a step on {stage['batch_size']} x {_shape(stage)}, on each device")
        time = result["steps"][i] if topology.chip else None
        yield from _costs(stage["train"], time)
        if time:
            whole = f"{estimate.in_time(time['whole'])} for {stage['num_steps']:,} steps"
            yield _row("roofline", f"{estimate.in_units(1 / time['seconds'], 'steps/s')}, {whole}")
    if "sample" in found:
        yield from ("", f"drawing {config.sample.batch_size} samples, on each device")
        time = result["drawing"] if topology.chip else None
        yield from _costs(found["sample"], time)
        if time:
            yield _row("roofline", f"{estimate.in_time(time['whole'])} for {config.sample.num:,}")
    yield ""
    if topology.chip:
        peak = topology.chip.float32 if config.model.dtype == "float32" else topology.chip.bfloat16
        yield (
            f"Times are a roofline's: arithmetic at {estimate.in_units(peak, 'FLOP/s')} or memory "
            f"at {estimate.in_units(topology.chip.bandwidth, 'B/s')},\nwhatever takes longer. Most "
            "programs are slower; one that keeps much in caches may be faster."
        )
    if result["fits"]:
        yield f"It fits; training takes {estimate.in_time(result['whole'])} by the roofline."
    elif result["fits"] is False:
        yield "It does not fit. Try"
        yield from (f"  {each}" for each in result["try"])


def memory_lines(found: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is printed of memory."""
    for name, size in found["state"].items():
        yield _row(name, estimate.in_bytes(size))
    for stage in found["stages"]:
        train = stage["train"]
        of = f", {_shape(stage)}" if len(found["stages"]) > 1 else ""
        yield _row("batch" + of, estimate.in_bytes(stage["batch"]))
        if "refused" in train:
            yield _row("the compiler says" + of, train["refused"])
        else:
            yield _row("temporaries" + of, estimate.in_bytes(train["temporaries"]))
            yield _row("the program" + of, estimate.in_bytes(train["program"]))
    whole = "" if result["usable"] is None else f" of {estimate.in_bytes(result['usable'])}"
    for name, key in (("training", "needed"), ("drawing", "needed_drawing")):
        if name == "training" or "sample" in found:
            needed = result[key]
            text = "more than there is" if needed is None else estimate.in_bytes(needed)
            yield _row(f"in all, {name}", text + whole)


def _shape(stage: Mapping[str, Any]) -> str:
    return " x ".join(map(str, stage["shape"]))


def _row(name: str, value: str) -> str:
    return f"  {name:20}{value}"


def _costs(costs: Mapping[str, Any], time: Mapping[str, Any] | None) -> Iterator[str]:
    def at(name: str) -> str:
        return f", {estimate.in_time(time[name])}" if time else ""

    yield _row("arithmetic", estimate.in_units(costs["flops"], "FLOP") + at("arithmetic"))
    if "bytes" in costs:
        yield _row("read and written", estimate.in_units(costs["bytes"], "B") + at("memory"))
        yield _row("between devices", estimate.in_units(costs["between_devices"], "B"))
    if "kernels" in costs:
        yield _row("kernels", f"{costs['kernels']:,}")


def main() -> None:
    """Runs the command."""
    config, topology = FLAGS.config, chips.parse(FLAGS.topology)
    try:
        given = tuple(int(side) for side in FLAGS.shape or ())
    except ValueError as error:
        raise ValueError(f"--shape must be like 256,256,3, got {FLAGS.shape}") from error
    shape = example_shape(config, given)
    check(config, topology)
    print(f"planning {config.name} for {FLAGS.topology}: a large network takes minutes", flush=True)
    found = measure(config, FLAGS.topology, shape)
    result = estimate.assess(config, topology, found)
    print("", *lines(config, topology, found, result), sep="\n")
    if FLAGS.json:
        everything = {"config": runs.as_json(config), "topology": FLAGS.topology}
        everything |= {"found": found, "result": result}
        Path(FLAGS.json).write_text(json.dumps(everything, indent=2) + "\n")
        print(f"wrote {FLAGS.json}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
