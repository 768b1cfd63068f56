"""Draws samples from a trained model.

    python -m experiments.sample --workdir=runs/digits --num=100
    python -m experiments.sample --workdir=runs/digits --num=20 --first_index=40 --solver=ddpm \
        --steps=1000 --gif

Sample i of a seed is the same picture whatever the batch size and the number of devices: the second
command draws those numbered 40 to 59.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import build, report, runs, runtime
from experiments.config import default
from jaxdiff import sampling, viz
from jaxdiff.base import PyTree
from jaxdiff.training import checkpoints

FLAGS = flags.FLAGS
GIF_FRAMES = 50

# Flags that override the run's own `config.sample`.
OVERRIDES = ("num", "batch_size", "solver", "variance", "eta", "grid", "steps", "seed", "clip")


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory of the trained model.")
    flags.DEFINE_string("out", None, "Folder to write to; WORKDIR/drawn if not given.")
    flags.DEFINE_integer("step", None, "The checkpoint to use; the newest if not given.")
    flags.DEFINE_bool("ema", True, "Use the average of the parameters.")
    flags.DEFINE_integer("num", None, "How many samples.", lower_bound=1)
    flags.DEFINE_integer("first_index", 0, "The number of the first sample.", lower_bound=0)
    flags.DEFINE_integer("batch_size", None, "How many at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("seed", None, "The seed.", lower_bound=0)
    flags.DEFINE_enum("solver", None, list(build.SOLVERS), "The solver.")
    flags.DEFINE_enum("variance", None, ["small", "large"], "The variance of ddpm.")
    flags.DEFINE_float("eta", None, "The noise of ddim, in [0, 1].")
    flags.DEFINE_enum("grid", None, list(build.GRIDS), "The spacing of the steps.")
    flags.DEFINE_integer("steps", None, "How many steps, 1 to the schedule's number.")
    flags.DEFINE_bool("clip", None, "Clip the predicted clean data to [-1, 1].")
    flags.DEFINE_bool("gif", False, "Also write the reverse process of the first samples.")


def load(workdir: Path, step: int | None, *, ema: bool) -> tuple[ConfigDict, PyTree, tuple, int]:
    """Returns the run's configuration, its parameters, an example's shape and the step.

    Raises:
      RunError: the directory holds no run, or none with a checkpoint.
      CheckpointError: the checkpoint cannot be read.
      FileNotFoundError: there is no checkpoint of that step.
    """
    config = runs.load_config(workdir, default())
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise runs.RunError(f"{workdir} has no checkpoint yet: train it first")
    shape = runs.example_shape(workdir)
    everywhere = NamedSharding(build.mesh(), PartitionSpec())
    init, _ = build.make_training(config, shape)
    like = build.placed(jax.eval_shape(init), everywhere)
    with checkpoints.open_folder(folder, read_only=True) as saved:
        state = checkpoints.restore(saved, like, step).state
    return config, state.ema if ema else state.params, shape, int(state.step)


def draw_all(
    config: ConfigDict, params: PyTree, shape: tuple[int, ...], first_index: int
) -> np.ndarray:
    """Returns `config.sample.num` samples, numbered from `first_index` on."""
    draw = functools.partial(build.make_draw(config, shape), params)
    options, drawn = config.sample, []
    with tqdm.tqdm(total=options.num, unit="sample", desc="samples", disable=None) as bar:
        for batch in sampling.in_batches(draw, options.num, first_index=first_index):
            drawn.append(batch)
            bar.update(len(batch))
    return np.concatenate(drawn)


def save_gif(
    path: Path, config: ConfigDict, params: PyTree, shape: tuple[int, ...], first_index: int
) -> None:
    """Writes the reverse process of the first samples: above x_t, below the predicted x0."""
    config = config.copy_and_resolve_references()
    config.sample.batch_size = min(config.sample.num, 16)
    every = -(-config.sample.steps // GIF_FRAMES)
    draw = build.make_draw(config, shape, trajectory_every=every)
    _, record = draw(params, first_index)
    frames = [
        viz.image_grid(viz.to_uint8(np.concatenate([x, x0])), columns=config.sample.batch_size)
        for x, x0 in zip(np.asarray(record.x), np.asarray(record.x0), strict=True)
    ]
    viz.save_gif(path, frames)


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir)
    config, params, shape, step = load(workdir, FLAGS.step, ema=FLAGS.ema)
    for name in OVERRIDES:
        if (value := getattr(FLAGS, name)) is not None:
            config.sample[name] = value
    out = Path(FLAGS.out or workdir / "drawn")
    out.mkdir(parents=True, exist_ok=True)
    samples = draw_all(config, params, shape, FLAGS.first_index)
    options = {**config.sample.to_dict(), "step": step, "ema": FLAGS.ema}
    report.save_samples(out / "samples", samples, options, first_index=FLAGS.first_index)
    if FLAGS.gif:
        save_gif(out / "samples.gif", config, params, shape, FLAGS.first_index)
    print(f"drew {len(samples)} samples with the parameters of step {step}")
    print(f"look at {out / 'samples.png'}; the samples themselves are in {out / 'samples.npz'}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
