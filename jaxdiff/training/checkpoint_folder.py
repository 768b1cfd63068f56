"""A folder of checkpoints: Orbax's, with errors that say what to do and whom nothing keeps closed.

A save that fails, as on a full disk, is told at the next opportunity; the older checkpoints are not
touched by it, and the folder works again when there is room. A damaged checkpoint does not keep it
from being opened.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

_NAME = re.compile(r"0|[1-9][0-9]*")  # of a complete checkpoint: Orbax renames it to that


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message says which, why and what to do."""


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
        self._response: Any = None  # Orbax's, of that save
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

    def start_save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Starts a save, which goes on in the background; the arrays are copied at once.

        Raises:
          CheckpointError: it failed, or the one before.
        """
        self.wait()
        with self._saves(step):
            if not self.directory.is_dir():  # Orbax would make another
                raise FileNotFoundError(f"{self.directory} has vanished")
            self._response = self.orbax.save_checkpointables_async(
                step, {"state": tree}, force=True, custom_metadata=metadata
            )
        self._saving = step

    def wait(self) -> None:
        """Waits for a save that is under way.

        Raises:
          CheckpointError: it failed.
        """
        response, self._response = self._response, None
        try:
            with self._saves(self._saving):
                self._orbax.wait()
        finally:
            if response is not None:
                # It has a thread, which ends when it is asked, and tells the same once more.
                with contextlib.suppress(Exception):
                    response.result()
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
                f"says, and give the same command again. Cause: {cause(error)}"
            ) from error

    def _open(self) -> ocp.training.Checkpointer:
        # Replicas share the writing of large arrays only: cutting up small ones costs more than it
        # saves (about 2 s a save for the digits network on 8 devices).
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
        policies = ocp.training.preservation_policies
        return ocp.training.Checkpointer(
            self.directory,
            context=context,
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


def cause(error: Exception) -> str:
    """Returns what went wrong, in short."""
    return f"{error.__cause__ or error}"[:500] or type(error).__name__


def _steps(folder: Path) -> list[int]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in paths if _NAME.fullmatch(path.name))
