"""One run at a time in a run directory: a lock that dies with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from experiments.runs import RunError

NAME = ".lock"  # stays behind, unlocked: to remove it would race with who opens it

# The files (device, inode) locked by this process: the system's locks are between processes only.
# With the process they are of, since a forked child has the list but not the locks.
_held: dict[tuple[int, int], int] = {}


@contextlib.contextmanager
def hold(workdir: str | Path) -> Iterator[None]:
    """Holds a run directory; use it in a `with`.

    The lock is the operating system's (POSIX, `fcntl`): it ends with the process, however that
    ends, and its children do not have it. Do not open the file `.lock` meanwhile: closing it would
    release the lock.

    Args:
      workdir: the run directory, which is there.

    Raises:
      RunError: another run holds it, or it cannot be written to.
    """
    path = Path(workdir) / NAME
    try:
        status = path.stat() if path.exists() else None
        if status and _held.get((status.st_dev, status.st_ino)) == os.getpid():
            raise RunError(_refusal(workdir, "this very process"))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(
            f"cannot write to the run directory {workdir}: {error.strerror}. Choose another with "
            "--workdir=DIR"
        ) from error
    key = None
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(_refusal(workdir, _holder(descriptor))) from None
        except OSError as error:  # some network file systems
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}): see to it yourself that no other run "
                "is in this directory",
                stacklevel=3,
            )
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino
        _held[key] = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode() + b"\n", 0)
        yield
    finally:
        _held.pop(key, None)
        os.close(descriptor)  # which unlocks it


def _refusal(workdir: str | Path, holder: str) -> str:
    return (
        f"another run is going on in {workdir}: {holder} holds it. Wait for its end, end it, or "
        "choose another --workdir"
    )


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {about['process']} on {about['host']}, since {about['since']},"
    except (ValueError, KeyError, TypeError):  # it is just writing it
        return "another process"
