"""Runs a run again, and says whether it is the same bit for bit.

    python -m experiments.reproduce --workdir=runs/digits
    python -m experiments.reproduce --workdir=runs/cifar10 --until=1000

The configuration and the seed are those recorded; the new run is in WORKDIR_again, or where --out
says. Compared are the loss of every step and the parameters; where they differ, the first step that
does is named, and what differs in the environment. The exit status is 0 if all is the same, and 3
if not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import runs, runtime, train
from jaxdiff.training import TrainState, checkpoints, sharding

FLAGS = flags.FLAGS
DIFFERENT = 3
ENVIRONMENT = ("versions", "devices", "processes", "python", "machine", "xla_flags", "mesh")


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory of the run.")
    flags.DEFINE_string("out", None, "The directory of the new run; WORKDIR_again if not given.")
    flags.DEFINE_integer("until", None, "How many steps to do again; all if not given.", 1)


def reproduce(workdir: Path, out: Path, until: int | None = None) -> dict[str, Any]:
    """Runs a run again and compares.

    Args:
      workdir: the run directory.
      out: the directory of the new run, which must not exist yet.
      until: how many steps; all that were recorded if not given.

    Returns:
      `steps`, how many losses were compared; `first`, the first step that differs or None;
      `parameters`, the step whose parameters were compared or None; `arrays`, the names of those
      that differ; `environment`, `(key, there, here)` of what differs.

    Raises:
      RunError: there is no run, or nothing recorded to compare with; `out` exists.
    """
    config, about = runs.load_config(workdir), runs.about(workdir)
    recorded = runs.read_losses(workdir)
    if not len(recorded):
        raise runs.RunError(f"{workdir} has no losses.f32: there is nothing to compare with")
    if out.exists():
        raise runs.RunError(f"{out} exists: choose another --out")
    sharding.barrier("out")  # of several processes the first will make it
    until = min(until or len(recorded), len(recorded))
    # The same layout, if there are as many devices here.
    layout = about.get("mesh", {})
    if np.prod(list(layout.values())) == jax.device_count():
        config.mesh.update(layout)
    state = train.train(config, out, until=until)
    sharding.barrier("again")
    again = runs.read_losses(out)[:until]
    # What is not a number was not recorded, or if it was, shows in the steps that follow.
    known = ~np.isnan(recorded[:until])
    differ = np.flatnonzero(known & (again.view(np.uint32) != recorded[:until].view(np.uint32)))
    at, arrays = compare_parameters(workdir, out, state)
    environment = runs.differences(
        {key: about.get(key) for key in ENVIRONMENT},
        {key: runs.about(out).get(key) for key in ENVIRONMENT},
    )
    return {
        "steps": int(known.sum()),
        "first": int(differ[0]) + 1 if len(differ) else None,
        "parameters": at,
        "arrays": arrays,
        "environment": environment,
    }


def compare_parameters(workdir: Path, out: Path, state: TrainState) -> tuple[int | None, list[str]]:
    """Returns the newest step that both have a checkpoint of, and the arrays that differ there."""
    like = sharding.placed(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    with (
        checkpoints.open_folder(workdir / "checkpoints", read_only=True) as there,
        checkpoints.open_folder(out / "checkpoints", read_only=True) as here,
    ):
        both = max(set(there.steps) & set(here.steps), default=None)
        if both is None:
            return None, []
        old, new = (checkpoints.restore(saved, like, both).state for saved in (there, here))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path({"params": old.params, "ema": old.ema}),
        jax.tree.leaves({"params": new.params, "ema": new.ema}),
        strict=True,
    )
    return both, [
        jax.tree_util.keystr(path)
        for (path, a), b in pairs
        if sharding.to_host(a).tobytes() != sharding.to_host(b).tobytes()
    ]


def tell(found: dict[str, Any]) -> bool:
    """Prints what was found; returns whether all is the same."""
    first, at, arrays = found["first"], found["parameters"], found["arrays"]
    print(
        f"losses of {found['steps']} steps: the same bit for bit"
        if first is None
        else f"losses of {found['steps']} steps: step {first} is the first that differs"
    )
    if at is None:
        print("parameters: no step of which both runs have a checkpoint")
    elif arrays:
        shown = ", ".join(arrays[:5]) + (" ..." if len(arrays) > 5 else "")
        print(f"parameters of step {at}: {len(arrays)} arrays differ: {shown}")
    else:
        print(f"parameters of step {at}: the same bit for bit")
    same = first is None and not arrays
    for key, old, new in found["environment"]:
        print(f"environment: {key} was {old!r}, is {new!r}")
    if not same and not found["environment"]:
        print("environment: nothing that is recorded differs")
    return same


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir)
    out = Path(FLAGS.out or workdir.with_name(workdir.name + "_again"))
    if not tell(reproduce(workdir, out, FLAGS.until)):
        sys.exit(DIFFERENT)


if __name__ == "__main__":
    runtime.command(define_flags, main)
