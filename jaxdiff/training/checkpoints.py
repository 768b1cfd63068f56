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
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxdiff.training import checksums
from jaxdiff.training.train_step import TrainState

CHECKSUMS = "checksums"  # their key in the metadata
_NAME = re.compile(r"0|[1-9][0-9]*")  # of a complete checkpoint: Orbax renames it to that


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message says which, why and what to do."""


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


class Checkpointer(contextlib.AbstractContextManager):
    """An open folder of checkpoints: Orbax's checkpointer, with errors that say what to do.

    Attributes:
      directory: the folder.
      read_only: whether nothing in it may be touched.
    """

    def __init__(self, directory: Path, keep: int | None, read_only: bool) -> None:
        self.directory = directory
        self.read_only = read_only
        self._keep = keep
        self._saving: int | None = None  # the step of a save that is under way
        self._failed = False
        self._orbax = self._open()

    @property
    def orbax(self) -> ocp.training.Checkpointer:
        """Orbax's checkpointer."""
        if self._failed:  # it would repeat its failure; a new one clears away what is half-written
            self._close()
            self._orbax = self._open()
            self._failed = False
        return self._orbax

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return _steps(self.directory)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    def wait(self) -> None:
        """Waits for a save that is under way.

        Raises:
          CheckpointError: it failed.
        """
        with self._saves(self._saving):
            self._orbax.wait()
        self._saving = None

    def close(self) -> None:
        """Waits for a save that is under way, and closes the folder.

        Raises:
          CheckpointError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._close()

    def __exit__(self, *unused: object) -> None:
        self.close()

    def path(self, step: int) -> Path:
        """Returns the folder of a checkpoint."""
        return self.directory / str(step)

    @contextlib.contextmanager
    def _saves(self, step: int | None) -> Iterator[None]:
        """Turns what goes wrong with the save of a step into a CheckpointError."""
        try:
            yield
        except Exception as error:  # of any layer below: tensorstore raises ValueErrors
            self._failed, self._saving = True, None
            where = self.directory if step is None else self.path(step)
            raise CheckpointError(
                f"cannot save checkpoint {where}. The older checkpoints are intact (steps "
                f"{self.steps or 'none'}): make room, or mend what else the cause "
                f"says, and give the same command again. Cause: {_cause(error)}"
            ) from error

    def _open(self) -> ocp.training.Checkpointer:
        # Replicas share the writing of large arrays only: cutting up small ones costs more than it
        # saves (about 2 s a save for the digits network on 8 devices).
        arrays = ocp.options.ArrayOptions(
            saving=ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=2**20)
        )
        policies = ocp.training.preservation_policies
        return ocp.training.Checkpointer(
            self.directory,
            context=ocp.Context(array_options=arrays),
            preservation_policy=policies.LatestN(self._keep) if self._keep else None,
            step_name_format=_Readable(),
            cleanup_tmp_directories=not self.read_only,
        )

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # what has failed has been told
            self._orbax.close()


class _Readable(ocp.path.step.NameFormat):
    """Orbax's names of checkpoints, without those whose metadata is damaged.

    With them it could not open the folder at all. They are none of its concern until they are
    restored, which says so.
    """

    _standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._standard.build_name(step)

    def find_step(self, base_path: ocp.path.PathLike, step: int) -> Any:
        return self._standard.find_step(base_path, step)

    def find_all(self, base_path: ocp.path.PathLike) -> Iterator[Any]:
        for step in _steps(Path(base_path)):
            with contextlib.suppress(Exception):
                found = self.find_step(base_path, step)
                _ = found.commit_timestamp  # is read here, if not before
                yield found


def open_folder(
    folder: str | Path, *, keep: int | None = 3, read_only: bool = False
) -> Checkpointer:
    """Opens a folder of checkpoints; use it in a `with`, which ends pending saves.

    Args:
      folder: the folder; made if it is missing.
      keep: how many of the newest checkpoints to keep; all if None.
      read_only: touch nothing: neither make the folder nor clear away unfinished saves, which may
        be those of a run that is still going on.

    Returns:
      The open folder: `.latest` is the newest complete checkpoint or None, `.steps` are all.

    Raises:
      ValueError: `keep` is less than 1.
      FileNotFoundError: `read_only`, and the folder is missing.
      OSError: the folder cannot be made or written to.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder).absolute()
    if read_only and not folder.is_dir():
        raise FileNotFoundError(f"no folder of checkpoints at {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpointer(folder, keep, read_only)


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
    with checkpoints._saves(step):
        if not checkpoints.directory.is_dir():  # Orbax would make another
            raise FileNotFoundError(f"{checkpoints.directory} has vanished")
        checkpoints.orbax.save_checkpointables_async(
            step, {"state": tree}, force=True, custom_metadata={**metadata, CHECKSUMS: sums}
        )
        checkpoints._saving = step


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
            f"Cause: {_cause(error)}"
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
            failures[step] = _cause(error)
            continue
        _move_aside(checkpoints, failures, step)
        return restored
    if not failures:
        raise _none_there(checkpoints, None)
    tried = "\n".join(f"  {checkpoints.path(s)}: {cause}" for s, cause in failures.items())
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
        names = [checksums.name(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
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
    for step, cause in failures.items() if jax.process_index() == 0 else ():
        warnings.warn(
            f"checkpoint {checkpoints.path(step)}{moved[step]} is damaged: going back to step "
            f"{whole}. Cause: {cause}",
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


def _steps(folder: Path) -> list[int]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in paths if _NAME.fullmatch(path.name))


def _cause(error: Exception) -> str:
    return f"{error.__cause__ or error}"[:500] or type(error).__name__


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
