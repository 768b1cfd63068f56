"""A run directory: what is in it, and that nothing in it is ever half-written.

config.json          the resolved configuration
run.json             seed, versions, devices, number of parameters, hash at the end
metrics.jsonl        a line a logged step
checkpoints/         Orbax's
samples/, samples.*  pictures, and the samples themselves
report.html          all of it, to look at
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

PACKAGES = ("jaxdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunError(Exception):
    """A run cannot be started or gone on with; the message says why and what to do."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text so that the file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration as JSON holds it (tuples are lists there)."""
    return json.loads(config.to_json())


def load_config(workdir: Path, default: ConfigDict) -> ConfigDict:
    """Returns the configuration of a run.

    Args:
      workdir: the run directory.
      default: the configuration with all keys and types.

    Raises:
      RunError: the directory holds no run, or one of a version with other keys.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise RunError(
            f"{workdir} holds no run (no config.json): train one with --workdir={workdir}"
        )
    try:
        saved = json.loads(path.read_text())
        # Runs from before there was this key skip nothing, and keep no count of it.
        saved.setdefault("train", {}).setdefault("max_skipped", 0)
        _update(default, saved)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged, or of another version of jaxdiff: {error}") from error
    return default


def example_shape(workdir: Path) -> tuple[int, ...]:
    """Returns the shape of one example of a run, `(*spatial, C)`.

    Raises:
      RunError: the run never got as far as to know it.
    """
    path = workdir / "run.json"
    try:
        return tuple(json.loads(path.read_text())["example_shape"])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} is missing or damaged: train the run again") from error


def _update(config: ConfigDict, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if isinstance(value, dict):
            _update(config[key], value)
        elif value is not None:
            config[key] = tuple(value) if isinstance(value, list) else value


def open_workdir(workdir: Path, config: ConfigDict, *, allow_change: bool = False) -> None:
    """Makes the run directory, or checks that the run in it is of the same configuration.

    The configuration is not written yet: that is for when the run could be gone on with.

    Raises:
      RunError: it cannot be written to, or holds a run of another configuration and
        `allow_change` is not set.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"cannot write to the run directory {workdir}: {error.strerror}. Choose another with "
            "--workdir=DIR"
        ) from error
    path = workdir / "config.json"
    if path.exists() and not allow_change:
        changed = differences(json.loads(path.read_text()), as_json(config))
        if changed:
            lines = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in changed)
            raise RunError(
                f"{workdir} holds a run of another configuration:\n{lines}\n"
                "Choose another --workdir, or say --allow_config_change to go on with the new one"
            )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Returns `(key, old, new)` of all that differs, keys dotted."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, a, b))
    return found


def describe(config: ConfigDict, num_params: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns what a reader must know to get the same run again."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = jax.devices()
    return {
        "name": config.name,
        "seed": config.seed,
        "parameters": num_params,
        "example_shape": list(shape),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "command": " ".join([Path(sys.executable).name, "-m", *_module_and_arguments()]),
        "versions": versions,
    }


def _module_and_arguments() -> list[str]:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]


def fingerprint(tree: Any) -> str:
    """Returns the SHA-256 of names, types, shapes and bytes of all arrays of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Metrics:
    """The lines of `metrics.jsonl`.

    Lines of steps after `step` are dropped when opened: they are of work that was lost, and is
    done again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.lines = [line for line in _lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        """Appends a line."""
        self.lines.append(values)
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the last line of a run that was killed while writing it
    return lines
