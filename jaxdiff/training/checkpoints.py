"""Checkpoints: a train state, where the data stood, and the configuration, saved as one by Orbax.

A checkpoint is written under a temporary name, in the background, and renamed when complete, so an
interrupted save leaves nothing that looks like a checkpoint and does not touch those before. The
data's position and the configuration are JSON beside the arrays; nothing is pickled.

Example:
  >>> import jax, jax.numpy as jnp, optax, tempfile
  >>> from jaxdiff.training import init_state
  >>> state = init_state({"w": jnp.arange(3.0)}, optax.adam(1e-3))
  >>> with tempfile.TemporaryDirectory() as folder, open_folder(folder) as checkpoints:
  ...     save(checkpoints, state, data={"next_index": 0}, config={"seed": 1})
  ...     restore(checkpoints, state).data
  {'next_index': 0}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from jaxdiff.training.train_step import TrainState

Checkpointer = ocp.training.Checkpointer


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message says which, why and what to do."""


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: the train state.
      data: the state of the data iterator, as it was given.
      config: the configuration, as it was given.
    """

    state: TrainState
    data: Any
    config: Mapping[str, Any]


def open_folder(folder: str | Path, *, keep: int = 3, read_only: bool = False) -> Checkpointer:
    """Opens a folder of checkpoints; use it in a `with`, which ends pending saves.

    Args:
      folder: the folder; made if it is missing.
      keep: how many of the newest checkpoints to keep.
      read_only: touch nothing: neither make the folder nor clear away unfinished saves, which may
        be those of a run that is still going on.

    Returns:
      Orbax's checkpointer: `.latest` is the newest complete checkpoint or None.

    Raises:
      ValueError: `keep` is less than 1.
      FileNotFoundError: `read_only`, and the folder is missing.
      OSError: the folder cannot be made or written to.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder).absolute()
    if read_only and not folder.is_dir():
        raise FileNotFoundError(f"no folder of checkpoints at {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    # Replicas share the writing of large arrays only: cutting up small ones costs more than it
    # saves (about 2 s a save for the digits network on 8 devices).
    arrays = ocp.options.ArrayOptions(
        saving=ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=2**20)
    )
    return Checkpointer(
        folder,
        context=ocp.Context(array_options=arrays),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=not read_only,
    )


def save(
    checkpoints: Checkpointer, state: TrainState, *, data: Any, config: Mapping[str, Any]
) -> None:
    """Saves a checkpoint named after the state's step; it is written in the background.

    The arrays are copied before this returns, so the state may be donated at once. A save still
    under way is waited for, and its failure raised here.

    Args:
      checkpoints: the open folder.
      state: the train state, on any sharding.
      data: the state of the data iterator, anything that JSON can hold.
      config: the configuration, anything that JSON can hold.
    """
    checkpoints.save_checkpointables_async(
        int(state.step),
        {"state": _fields(state)},
        force=True,
        custom_metadata={"data": data, "config": dict(config)},
    )


def restore(checkpoints: Checkpointer, like: TrainState, step: int | None = None) -> Restored:
    """Restores a checkpoint.

    Args:
      checkpoints: the open folder.
      like: a state of the same structure, of arrays or `jax.ShapeDtypeStruct`s with shardings: the
        arrays come back with its types and shardings, whatever they were saved with.
      step: which checkpoint; the newest if not given.

    Returns:
      The state, the data iterator's state and the configuration.

    Raises:
      FileNotFoundError: there is no checkpoint, or none of that step.
      CheckpointError: it is damaged, or of another structure than `like`.
    """
    checkpoints.wait()  # for a save that is under way
    steps = [checkpoint.step for checkpoint in checkpoints.checkpoints]
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        raise FileNotFoundError(
            f"no checkpoint {'' if step is None else f'of step {step} '}in "
            f"{checkpoints.directory}, which has {steps or 'none'}"
        )
    try:
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
            _fields(like),
        )
        metadata = checkpoints.checkpointables_metadata(step).custom_metadata or {}
        missing = {"data", "config"} - set(metadata)
        if missing:
            raise ValueError(f"its _CHECKPOINT_METADATA is damaged: no {sorted(missing)}")
        fields = checkpoints.load_checkpointables(step, {"state": abstract})["state"]
    except Exception as error:  # whatever a damaged file leads to, in any layer below
        older = [s for s in steps if s < step]
        cure = f"go on from step {older[-1]}" if older else "start afresh"
        cause = str(error.__cause__ or error)
        raise CheckpointError(
            f"cannot restore checkpoint {Path(checkpoints.directory) / str(step)}: it is damaged "
            f"or of another model or optimiser. To {cure}, delete that folder and run the same "
            f"command. Cause: {cause[:500]}"
        ) from error
    return Restored(TrainState(**fields), metadata["data"], metadata["config"])


def _fields(state: TrainState) -> dict[str, Any]:
    """Returns what is saved of a state, by name.

    No history, no counts and no further averages are no entries, so that checkpoints from before
    there were such are read as well.
    """
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    for name in ("history", "skipped", "averages"):
        if fields[name] is None:
            del fields[name]
    return fields
