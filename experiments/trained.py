"""Models that a run directory holds."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments import build, cohorts, runs
from jaxdiff.base import PyTree
from jaxdiff.training import checkpoints, sharding


def load(
    workdir: Path, step: int | None, *, ema: bool, tables_too: bool = False, fsdp: int = 1
) -> tuple[ConfigDict, PyTree, tuple, int]:
    """Returns the run's configuration, its parameters, an example's shape and the step.

    Args:
      workdir: the run directory.
      step: which checkpoint; None for the newest.
      ema: whether to return the average of the parameters.
      tables_too: whether the caller knows what to do with models of tables.
      fsdp: over how many devices the parameters are divided.

    Raises:
      RunError: the directory holds no run, or none with a checkpoint, or that of a table.
      CheckpointError: the checkpoint cannot be read.
      FileNotFoundError: there is no checkpoint of that step.
    """
    config = runs.load_config(workdir)
    config.mesh.fsdp = fsdp
    if build.is_table(config) and not tables_too:
        raise runs.RunError(
            f"{workdir} holds a model of a table, and this command is for images: there are "
            "experiments.sample, evaluate and complete"
        )
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise runs.RunError(f"{workdir} has no checkpoint yet: train it first")
    shape = runs.example_shape(workdir)
    own = cohorts.load_templates(workdir).own if build.is_table(config) else None
    init, _ = build.make_training(config, shape, own)
    like = jax.eval_shape(init)
    places = sharding.fully_sharded(build.make_mesh(config), like)
    like = sharding.placed(like, places)
    with checkpoints.open_folder(folder, read_only=True) as saved:
        state = checkpoints.restore(saved, like, step).state
    return config, state.ema if ema else state.params, shape, int(state.step)


def load_weak(config: ConfigDict, workdir: Path, *, ema: bool) -> PyTree:
    """Returns the parameters of the worse network of autoguidance, or None for others.

    Raises:
      ValueError: autoguidance is not told which.
    """
    if config.sample.guidance != "autoguidance":
        return None
    step = config.sample.guidance_options.weak_step
    if step is None:
        raise ValueError("autoguidance needs a worse network: name a checkpoint by --weak_step")
    return load(workdir, step, ema=ema, fsdp=config.mesh.fsdp)[1]
