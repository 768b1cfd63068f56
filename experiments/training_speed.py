"""What training costs beyond its steps: its loop, with data and metrics, and its data alone.

The loop runs as in an experiment, and stands still at the end of each part of it, while as many
steps of the compiled program alone are timed. No checkpoint is written in a part that is timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import build, loop, packing, programs, runs, timing
from experiments.sizes import Size
from jaxdiff import data
from jaxdiff.base import PyTree
from jaxdiff.training import checkpoints, sharding

IMAGES = 10_000


def random_images(size: Size) -> data.Source:
    """Returns random images of a size, labelled if the network takes labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, *size.shape), dtype=np.uint8)
    classes = size.config.labels.num_classes
    return data.from_arrays(pixels, labels=np.arange(IMAGES) % classes if classes else None)


def has_grain() -> bool:
    """Returns whether the library that makes batches is installed."""
    return importlib.util.find_spec("grain") is not None


class Repeated:
    """One batch without end, where Grain is not installed."""

    def __init__(self, batch: PyTree) -> None:
        self._batches = itertools.repeat(batch)

    def __iter__(self) -> Iterator[PyTree]:
        return self._batches

    def __next__(self) -> PyTree:
        return next(self._batches)

    def get_state(self) -> dict[str, int]:
        """Returns a place that is the same everywhere."""
        return {"next_index": 0}


def make_batches(size: Size) -> Any:
    """Returns the pipeline's batches of random images, or one repeated where Grain is missing."""
    if has_grain():
        return build.make_batches(size.config, random_images(size))
    return Repeated(programs.host_batch(size))


def loop_and_steps(
    size: Size,
    step: programs.Program,
    steps: int,
    *,
    repeats: int,
    warmup: int = 1,
    tell: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Returns the times of parts of the loop, "loop", and of as many "steps" alone.

    Args:
      size: what is trained.
      step: the compiled train step.
      steps: of a part.
      repeats: how many parts are timed.
      warmup: how many before them.
      tell: is called after each part.
    """
    parts = repeats + max(1, warmup)  # the first compiles
    size = programs.with_changes(
        size,
        {
            "train": {
                "num_steps": parts * steps + 1,
                "steps_per_dispatch": 1,
                "log_every": steps,
                "sample_every": steps,
                "checkpoint_every": parts * steps + 2,
            }
        },
    )
    config, mesh = size.config, build.make_mesh(size.config)
    init, step_of_batch, like = programs.training(size)
    pack, unpack = packing.for_training(like, mesh)
    advance = loop.compile_step(step_of_batch, jax.eval_shape(pack, like), mesh)
    state = jax.jit(init, out_shardings=sharding.fully_sharded(mesh, like))()
    times: dict[str, list[float]] = {"loop": [], "steps": []}
    begun = 0.0

    def end_of_part(ema: PyTree, _: int) -> None:
        nonlocal begun
        jax.block_until_ready(ema)
        times["loop"].append(time.perf_counter() - begun)
        times["steps"].append(timing.seconds(lambda: [step.call() for _ in range(steps)][-1]))
        tell()
        begun = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        workdir = Path(folder)
        runs.write_json(workdir / "config.json", runs.as_json(config))
        with (
            checkpoints.open_folder(workdir / "checkpoints") as saved,
            runs.Metrics(workdir, 0) as metrics,
        ):
            begun = time.perf_counter()
            loop.run(
                config,
                pack(state),
                advance,
                make_batches(size),
                saved,
                metrics,
                last=config.train.num_steps,
                whole=unpack,
                preview=end_of_part,
            )
    return {name: values[-repeats:] for name, values in times.items()}


def data_sides(size: Size) -> dict[str, Callable[[int], float]]:
    """Returns `times -> seconds a batch` of the ways to make batches for the device.

    "grain" is the pipeline, with its batches sent to the device, and "resident" that of data that
    are there already.

    Raises:
      ImportError: Grain is not installed.
    """
    source, mesh = random_images(size), build.make_mesh(size.config)
    place = sharding.rows(mesh)
    batches = build.make_batches(size.config, source)
    held, addresses, take = build.make_resident(size.config, source)
    arrays = jax.device_put(held, sharding.everywhere(mesh))
    gather = jax.jit(take, out_shardings=place)

    def piped() -> Any:
        return sharding.from_rows(next(batches), place)

    def gathered() -> Any:
        return gather(arrays, sharding.from_rows(next(addresses), place))

    return {
        "grain": lambda times: timing.seconds(piped, times),
        "resident": lambda times: timing.seconds(gathered, times),
    }
