"""Checkpoints: a train state, where the data stood, and the configuration, saved as one by Orbax.

A checkpoint is written under a temporary name, in the background, and renamed when complete, so an
interrupted save leaves nothing that looks like a checkpoint and does not touch those before. The
data's position and the configuration are JSON beside the arrays; nothing is pickled. With them go
checksums of all of it, which are compared when it is read: what comes back is what was saved, or
an error.

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

import contextlib
import dataclasses
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxdiff.training import checksums
from jaxdiff.training.checkpoint_folder import Checkpointer, CheckpointError, cause, open_folder
from jaxdiff.training.train_step import TrainState

__all__ = [
    "CheckpointError", "CheckpointWarning", "Checkpointer", "Restored", "open_folder",
    "restore", "restore_newest", "restore_tree", "save", "save_tree",
]  # fmt: skip

CHECKSUMS = "checksums"  # their key in the metadata


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, and an older one is used."""


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


def save(
    checkpoints: Checkpointer, state: TrainState, *, data: Any, config: Mapping[str, Any]
) -> None:
    """Saves a checkpoint named after the state's step; it is written in the background.

    As `save_tree` does, of the fields of the state.

    Args:
      checkpoints: the open folder.
      state: the train state, on any sharding.
      data: the state of the data iterator, anything that JSON can hold.
      config: the configuration, anything that JSON can hold.

    Raises:
      CheckpointError: this save or the one before failed, as `save_tree` says.
    """
    metadata = {"data": data, "config": dict(config)}
    save_tree(checkpoints, int(state.step), _fields(state), metadata)


def save_tree(checkpoints: Checkpointer, step: int, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Saves arrays and what belongs to them as the checkpoint of a step, in the background.

    The arrays are copied before this returns, so they may be donated at once. A save still under
    way is waited for, and its failure raised here.

    Args:
      checkpoints: the open folder.
      step: what the checkpoint is called.
      tree: a pytree of arrays, on any sharding.
      metadata: what else to keep, anything that JSON can hold.

    Raises:
      CheckpointError: the save before failed, or this one did before it was in the background. The
        older checkpoints are intact.
      ValueError: there is a checkpoint of that step, or the metadata has the key "checksums".
    """
    if CHECKSUMS in metadata:
        raise ValueError(f"metadata must not have the key {CHECKSUMS!r}, which is for its own")
    checkpoints.wait()
    if step in checkpoints.steps:
        raise ValueError(f"there is a checkpoint of step {step} in {checkpoints.directory}")
    arrays = checksums.of_tree(tree)
    sums = {"arrays": arrays, "metadata": _digest(metadata, arrays)}
    checkpoints.start_save(step, tree, {**metadata, CHECKSUMS: sums})


def restore(checkpoints: Checkpointer, like: TrainState, step: int | None = None) -> Restored:
    """Restores a checkpoint and verifies it.

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
    return _restored(*restore_tree(checkpoints, _fields(like), step))


def restore_tree(
    checkpoints: Checkpointer, like: Any, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Restores what `save_tree` saved and verifies it.

    Args:
      checkpoints: the open folder.
      like: a pytree of the same structure, as for `restore`.
      step: which checkpoint; the newest if not given.

    Returns:
      The pytree and the metadata.

    Raises:
      FileNotFoundError: there is no checkpoint, or none of that step.
      CheckpointError: it is damaged, or of another structure than `like`.
    """
    checkpoints.wait()
    steps = checkpoints.steps
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        raise _none_there(checkpoints, step)
    try:
        return _read(checkpoints, like, step)
    except Exception as error:  # whatever a damaged file leads to, in any layer below
        older = [s for s in steps if s < step]
        cure = f"go on from step {older[-1]}" if older else "start afresh"
        raise CheckpointError(
            f"cannot restore checkpoint {checkpoints.path(step)}: it is damaged or of another "
            f"model or optimiser. To {cure}, delete that folder and run the same command. "
            f"Cause: {cause(error)}"
        ) from error


def restore_newest(checkpoints: Checkpointer, like: TrainState) -> Restored:
    """Restores the newest checkpoint that is whole, with a warning for each that is not.

    The damaged ones are moved aside, to `STEP.damaged` beside it, so that their steps can be saved
    again; nothing is deleted. In a run of several processes all take the same checkpoint.

    Args:
      checkpoints: the open folder. If it is read-only, nothing is moved.
      like: as for `restore`.

    Returns:
      The state, the data iterator's state and the configuration.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: none can be restored, or a damaged one not moved. If none can be restored,
        all are left where they are: they may be of another structure than `like`.
    """
    checkpoints.wait()
    failures: dict[int, str] = {}
    while True:
        # Process 0 says which: others may see the folder otherwise.
        untried = [step for step in checkpoints.steps if step not in failures]
        step = _of_first_process(max(untried, default=-1))
        if step < 0:
            break
        try:
            restored = _restored(*_read(checkpoints, _fields(like), step))
        except Exception as error:  # kept as text: the error would keep the arrays
            failures[step] = cause(error)
            continue
        _move_aside(checkpoints, failures, step)
        return restored
    if not failures:
        raise _none_there(checkpoints, None)
    tried = "\n".join(f"  {checkpoints.path(s)}: {why}" for s, why in failures.items())
    raise CheckpointError(
        "cannot restore any checkpoint: they are damaged or of another model or optimiser. All are "
        "left as they are; to start afresh, take another folder or delete them. Tried:\n" + tried
    )


def _read(checkpoints: Checkpointer, like: Any, step: int) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint and verifies it; in several processes it fails in all or in none."""
    # Whoever cannot read says so before the others wait for it to add up the checksums.
    with _in_all_processes():
        path = checkpoints.path(step)
        metadata = dict(ocp.checkpointables_metadata(path).custom_metadata or {})
        expected = _take_checksums(metadata)
        names = [checksums.name(p) for p, _ in jax.tree_util.tree_leaves_with_path(like)]
        if expected is not None and sorted(expected) != sorted(names):
            differ = sorted({*expected} ^ {*names})
            raise ValueError(f"it holds other arrays; the first that differ: {differ[:5]}")
        # As it was saved, for the checksums.
        types = (expected[name].split()[0] if expected else None for name in names)
        leaves = [
            jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=a.sharding)
            for a, dtype in zip(jax.tree.leaves(like), types, strict=True)
        ]
        abstract = jax.tree.unflatten(jax.tree.structure(like), leaves)
        tree = ocp.load_checkpointables(path, {"state": abstract})["state"]
    with _in_all_processes():
        if expected is not None:
            found = checksums.of_tree(tree)
            wrong = [name for name in names if found[name] != expected[name]]
            if wrong:
                raise ValueError(f"wrong checksums of {len(wrong)} arrays, such as {wrong[:5]}")
    tree = jax.tree.map(lambda a, b: a if a.dtype == b.dtype else a.astype(b.dtype), tree, like)
    return tree, metadata


def _take_checksums(metadata: dict[str, Any]) -> dict[str, str] | None:
    """Removes the arrays' checksums from the metadata, verifies these, and returns those."""
    if metadata.keys() == {"data", "config"}:  # from before there were checksums
        return None
    sums = metadata.pop(CHECKSUMS, None)
    if sums is None or sums["metadata"] != _digest(metadata, sums["arrays"]):
        raise ValueError("its _CHECKPOINT_METADATA is damaged")
    return sums["arrays"]


def _digest(metadata: Mapping[str, Any], arrays: Mapping[str, str]) -> str:
    # Through JSON, which makes lists of tuples and texts of all keys, before they are sorted.
    text = json.dumps(json.loads(json.dumps([dict(metadata), arrays])), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _move_aside(checkpoints: Checkpointer, failures: Mapping[int, str], whole: int) -> None:
    """Renames damaged checkpoints and warns of each."""
    moved = dict.fromkeys(failures, "")
    if failures and not checkpoints.read_only:
        with _in_all_processes():
            if jax.process_index() == 0:
                for step in failures:
                    moved[step] = f", now {_rename(checkpoints.path(step))},"
        checkpoints.orbax.reload()
    for step, why in failures.items() if jax.process_index() == 0 else ():
        warnings.warn(
            f"checkpoint {checkpoints.path(step)}{moved[step]} is damaged: going back to step "
            f"{whole}. Cause: {why}",
            CheckpointWarning,
            stacklevel=3,
        )


def _rename(folder: Path) -> Path:
    # No name that Orbax takes for a checkpoint or a temporary folder.
    names = itertools.chain([".damaged"], (f".damaged-{i}" for i in itertools.count(2)))
    aside = next(p for p in (folder.with_name(folder.name + n) for n in names) if not p.exists())
    try:
        return folder.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged and cannot be moved aside: {error}. Move it away "
            "yourself and run the same command"
        ) from error


def _restored(fields: dict[str, Any], metadata: Mapping[str, Any]) -> Restored:
    missing = {"data", "config"} - metadata.keys()
    if missing:
        raise CheckpointError(f"this checkpoint is not of a train state: no {sorted(missing)}")
    return Restored(TrainState(**fields), metadata["data"], metadata["config"])


def _none_there(checkpoints: Checkpointer, step: int | None) -> FileNotFoundError:
    return FileNotFoundError(
        f"no checkpoint {'' if step is None else f'of step {step} '}in "
        f"{checkpoints.directory}, which has {checkpoints.steps or 'none'}"
    )


def _of_first_process(value: int) -> int:
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def _in_all_processes() -> Iterator[None]:
    """Raises in every process if something is raised in any."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failed.any() and failure is None:
            failure = ValueError(f"processes {np.flatnonzero(failed).tolist()} cannot read it")
    if failure is not None:
        raise failure


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
