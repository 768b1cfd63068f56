"""Makes a model of another average of a run's parameters, after training.

    python -m experiments.ema --workdir=runs/digits --sigma_rel=0.08
    python -m experiments.ema --workdir=runs/digits --sigma_rel=0.08 --step=2000
    python -m experiments.ema --workdir=runs/digits --average=half_life_1000
    python -m experiments.sample --workdir=runs/digits_ema_0.08

The first two are power-function averages of any width, put together from the snapshots of a run
(Karras et al. 2024, section 3.2), at the newest of them or at an earlier one; training must have
kept some, by --config.averages.sigma_rels=0.05,0.1 and --config.averages.snapshot_every=1000. The
third is an average that was tracked beside the main one.

OUT is a run directory that all other commands take. It holds a model to use, not a run to go on
with: the average is its parameters, too (--noema changes nothing), and the optimiser's state is
zero. Given again, the command replaces what it wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import build, cohorts, runs, runtime
from experiments.config import default
from jaxdiff.base import PyTree
from jaxdiff.training import TrainState, checkpoints, ema, sharding

FLAGS = flags.FLAGS
OF_TABLES = ("cohort.json", "schema.json")
"""What a run of a table has beside the others, and drawing needs."""


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory of the run.")
    flags.DEFINE_string(
        "out", None, "The new run directory; WORKDIR_ema_0.08 or WORKDIR_AVERAGE if not given."
    )
    flags.DEFINE_float("sigma_rel", None, "The width wanted, as a share of the training so far.")
    flags.DEFINE_string("average", None, "The name of an average that was tracked, instead.")
    flags.DEFINE_integer(
        "step", None, "That of a snapshot (of --average, of a checkpoint); the newest if not given."
    )


def make(
    workdir: Path,
    out: Path | None = None,
    *,
    sigma_rel: float | None = None,
    average: str | None = None,
    step: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Makes the run directory of an average.

    Args:
      workdir: the run directory of the run.
      out: the new one; beside `workdir`, named after the average, if not given.
      sigma_rel: the width of the average wanted, or
      average: the name of one that was tracked.
      step: at which snapshot or, of `average`, checkpoint; the newest if not given.

    Returns:
      The new run directory, and what its `run.json` says of the average.

    Raises:
      RunError: there is no run, or it kept nothing to make the average of; `out` holds something
        else; there are several processes.
      CheckpointError: a snapshot or the checkpoint cannot be read.
      ValueError: not one of `sigma_rel` and `average` is given; `sigma_rel` lies outside
        (0, 0.2887); there is no such average, or nothing of that step.
    """
    if jax.process_count() > 1:
        raise runs.RunError("experiments.ema is for one process: it sums on the host")
    if (sigma_rel is None) == (average is None):
        raise ValueError(
            "say which average: either --sigma_rel=0.08, of that width, or --average=NAME, which "
            "was tracked"
        )
    config, about = runs.load_config(workdir), runs.about(workdir)
    name = f"ema_{sigma_rel:g}" if average is None else average
    name += "" if step is None else f"_step_{step}"
    out = out or workdir.with_name(f"{workdir.name}_{name}")
    check_out(out)
    shape = runs.example_shape(workdir)
    own = cohorts.load_templates(workdir).own if build.is_table(config) else None
    like = jax.eval_shape(build.make_training(config, shape, own)[0])
    if average is None:
        params, of = reconstruct(workdir, config, like.params, sigma_rel, step)
    else:
        params, of = take_out(workdir, config, like, average, step)
    of |= {"workdir": str(workdir), "sha256": about.get("sha256")}

    new = config.copy_and_resolve_references()
    new.name, new.averages = f"{config.name}_{name}", default().averages
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    told = {**runs.describe(new, num_params, shape), "average": of}
    told["sha256"] = runs.fingerprint({"params": params, "ema": params})
    like = jax.eval_shape(build.make_training(new, shape, own)[0])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    state = dataclasses.replace(
        zeros, step=np.array(of["step"], np.int32), params=params, ema=params
    )
    others = OF_TABLES if build.is_table(config) else ()
    write(out, new, told, state, [workdir / other for other in others])
    return out, of


def reconstruct(
    workdir: Path, config: ConfigDict, like: PyTree, sigma_rel: float, step: int | None
) -> tuple[PyTree, dict[str, Any]]:
    """Returns the average of a width, of snapshots up to a step, and how it was made.

    Args:
      workdir: the run directory.
      config: the run's configuration.
      like: the parameters' shapes and types.
      sigma_rel: the width wanted.
      step: that of a snapshot; the newest if None. Later ones are not used.

    Raises:
      RunError: there are no snapshots, or of one width only.
      CheckpointError: a snapshot cannot be read.
      ValueError: `sigma_rel` lies outside (0, 0.2887), or there is no snapshot of that step.
    """
    widths = {f"power_{width:g}": width for width in config.averages.sigma_rels}
    folder = workdir / "snapshots"
    advice = (
        "train with --config.averages.sigma_rels=0.05,0.1 and "
        "--config.averages.snapshot_every=1000, in a new --workdir"
    )
    if not folder.is_dir():
        raise runs.RunError(f"{workdir} has no snapshots to make an average of: {advice}")
    if len(widths) < 2:
        raise runs.RunError(
            f"an average is made of snapshots of two widths or more, and {workdir} has those of "
            f"averages.sigma_rels={config.averages.sigma_rels}: {advice}"
        )
    with checkpoints.open_folder(folder, keep=None, read_only=True) as kept:
        found = kept.steps
        if not found:
            raise runs.RunError(f"{workdir} has no snapshot yet: train it on, or {advice}")
        step = found[-1] if step is None else step
        if step not in found:
            raise ValueError(f"step must be that of a snapshot, one of {found}, got {step}")
        steps = [each for each in found if each <= step]
        snapshots = [(width, each) for each in steps for width in widths.values()]
        weights = ema.posthoc_weights(snapshots, sigma_rel, step)
        weights /= weights.sum()  # what does not change from step to step comes back as it is
        residual = ema.posthoc_residual(snapshots, weights, sigma_rel, step)
        wanted = spread(dict.fromkeys(widths, like))

        def each_average() -> Iterator[PyTree]:
            for step in steps:
                tree, _ = checkpoints.restore_tree(kept, wanted, step)
                for name in widths:
                    yield tree.pop(name)

        params = ema.combine(each_average(), weights)
    return params, {
        "sigma_rel": sigma_rel,
        "step": step,
        "snapshots": steps,
        "widths": list(widths.values()),
        "weights": weights.reshape(len(steps), len(widths)).tolist(),
        "norm": float(np.linalg.norm(weights)),
        "residual": residual,
    }


def take_out(
    workdir: Path, config: ConfigDict, like: TrainState, name: str, step: int | None
) -> tuple[PyTree, dict[str, Any]]:
    """Returns an average that was tracked, and where it is from.

    Args:
      workdir: the run directory.
      config: the run's configuration.
      like: the state's shapes and types.
      name: that of the average.
      step: that of a checkpoint; the newest if None.

    Raises:
      RunError: the run tracked none, or there is no checkpoint.
      CheckpointError: the checkpoint cannot be read.
      ValueError: there is no such average, or no checkpoint of that step.
    """
    if not like.averages:
        raise runs.RunError(
            f"{workdir} tracked no average beside the main one: train with "
            "--config.averages.half_lives=100,1000, or averages.sigma_rels, in a new --workdir"
        )
    build.choose("--average", name, build.make_averages(config))
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise runs.RunError(f"{workdir} has no checkpoint yet: train it first")
    with checkpoints.open_folder(folder, read_only=True) as saved:
        if step is not None and step not in saved.steps:
            raise ValueError(f"step must be that of a checkpoint, one of {saved.steps}, got {step}")
        state = checkpoints.restore(saved, spread(like), step).state
    params = sharding.to_host(state.averages[name])
    return params, {"name": name, "step": int(state.step)}


def spread(like: PyTree) -> PyTree:
    """Returns what to restore a tree by, divided over all devices."""
    return sharding.placed(like, sharding.fully_sharded(sharding.make_mesh(1, -1), like))


def check_out(out: Path) -> None:
    """Checks that nothing else would be overwritten.

    Raises:
      RunError: `out` exists, and holds something that this command did not make.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    with contextlib.suppress(runs.RunError):
        if "average" in runs.about(out):
            return
    raise runs.RunError(f"{out} exists, and this command did not make it: choose another --out")


def write(
    out: Path, config: ConfigDict, about: dict[str, Any], state: TrainState, others: list[Path]
) -> None:
    """Writes the run directory; `others` are files to copy."""
    out.mkdir(parents=True, exist_ok=True)
    # In this order: what is interrupted holds no run, and can be done again.
    (out / "config.json").unlink(missing_ok=True)
    runs.write_json(out / "run.json", about)
    for path in others:
        shutil.copyfile(path, out / path.name)
    if (out / "checkpoints").exists():
        shutil.rmtree(out / "checkpoints")
    with checkpoints.open_folder(out / "checkpoints", keep=None) as saved:
        checkpoints.save(saved, state, data=None, config=runs.as_json(config))
    runs.write_json(out / "config.json", runs.as_json(config))


def tell(of: dict[str, Any]) -> None:
    """Prints how an average was made."""
    if "name" in of:
        print(f"{of['name']} of the checkpoint of step {of['step']}")
        return
    print(
        f"width {of['sigma_rel']:g} at step {of['step']}, made of {len(of['snapshots'])} snapshots"
    )
    print(f"  steps: {', '.join(map(str, of['snapshots']))}")
    print(f"  widths: {', '.join(f'{width:g}' for width in of['widths'])}")
    print(f"norm of the weights: {of['norm']:.3g} (by which the snapshots' rounding is magnified)")
    print(f"residual of the fit: {of['residual']:.2g} (of the profile wanted; 0 is exact)")


def main() -> None:
    """Runs the command."""
    out, of = make(
        Path(FLAGS.workdir),
        FLAGS.out and Path(FLAGS.out),
        sigma_rel=FLAGS.sigma_rel,
        average=FLAGS.average,
        step=FLAGS.step,
    )
    tell(of)
    print(f"wrote {out}: python -m experiments.sample --workdir={out}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
