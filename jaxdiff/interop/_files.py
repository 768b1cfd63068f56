"""Small files: JSON read strictly, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def parse_json(text: bytes) -> Any:
    """Parses JSON, in which no object may have a key twice.

    Raises:
      ValueError: it is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{twice!r} stands there twice")
        return seen

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | os.PathLike) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not one, or says something twice; names the file.
    """
    try:
        value = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike, value: Mapping) -> None:
    """Writes a JSON file, whole or not at all, as diffusers writes its own."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    replace(Path(path), [text.encode()])


def replace(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file under another name and then gives it its own, which is never half written."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # that of a temporary file is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_field(where: str, name: str, value: Any, fits: bool, expected: str) -> None:
    """Raises ValueError that names a file, a field of it and its value, unless that fits."""
    if not fits:
        raise ValueError(f"{where}: {name} must be {expected}, got {repr(value)[:200]}")
