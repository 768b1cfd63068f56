"""A run directory: what is in it, and that nothing in it is ever half-written.

config.json          the resolved configuration
run.json             seed, versions, devices, number of parameters, hash at the end
metrics.jsonl        a line a logged step
losses.f32           the loss of every step, float32, little-endian
checkpoints/         Orbax's
samples/, samples.*  pictures, and the samples themselves
report.html          all of it, to look at
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.config import default
from jaxdiff.training import sharding

PACKAGES = ("jaxdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What may differ when a run is gone on with, since it changes no result.
NO_MATTER = (
    *("mesh.data", "mesh.fsdp", "data.resident", "data.worker_count"),
    *("train.steps_per_dispatch", "train.log_every", "train.tensorboard"),
)


class RunError(Exception):
    """A run cannot be started or gone on with; the message says why and what to do."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text so that the file is there whole or not at all; one process does, of several."""
    if jax.process_index():
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration as JSON holds it (tuples are lists there)."""
    return json.loads(config.to_json())


def load_config(workdir: Path) -> ConfigDict:
    """Returns the configuration of a run.

    Args:
      workdir: the run directory.

    Raises:
      RunError: the directory holds no run, or one of a version with other keys.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise RunError(
            f"{workdir} holds no run (no config.json): train one with --workdir={workdir}"
        )
    try:
        return read_config(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged, or of another version of jaxdiff: {error}") from error


def read_config(saved: dict[str, Any]) -> ConfigDict:
    """Returns the configuration that `as_json` gave, also by an earlier version.

    Raises:
      KeyError, TypeError or ValueError: it is none.
    """
    config = default()
    _update(config, _of_now(saved))
    return config


def _of_now(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration as written by an earlier version with the keys of this one."""
    # Runs from before there was this key skip nothing, and keep no count of it.
    saved.setdefault("train", {}).setdefault("max_skipped", 0)
    if saved.get("optimizer", {}).pop("accumulate", 1) != 1:
        raise ValueError("optimizer.accumulate is now train.microbatches")
    # On what a run was trained is not what it is used on.
    saved.pop("mesh", None)
    return saved


def about(workdir: Path) -> dict[str, Any]:
    """Returns what `run.json` says of a run.

    Raises:
      RunError: the run never got as far as to write it.
    """
    path = workdir / "run.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged: train the run again") from error


def example_shape(workdir: Path) -> tuple[int, ...]:
    """Returns the shape of one example of a run, `(*spatial, C)`.

    Raises:
      RunError: the run never got as far as to know it.
    """
    try:
        return tuple(about(workdir)["example_shape"])
    except KeyError as error:
        raise RunError(f"{workdir}/run.json is damaged: train the run again") from error


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
    if jax.process_index():
        return
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
        there = as_json(load_config(workdir))
        changed = [
            change for change in differences(there, as_json(config)) if change[0] not in NO_MATTER
        ]
        if changed:
            lines = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in changed)
            raise RunError(
                f"{workdir} holds a run of another configuration:\n{lines}\n"
                "Choose another --workdir, or say --allow_config_change to go on with the new one"
            )


def check_there(workdir: Path) -> None:
    """Checks that nobody has taken away the directory of a run that is going on.

    Raises:
      RunError: it has gone.
    """
    if jax.process_index() == 0 and not (workdir / "config.json").exists():
        raise RunError(
            f"the run directory {workdir} has gone, or its config.json: nothing is saved"
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
        "mesh": dict(sharding.make_mesh(config.mesh.data, config.mesh.fsdp).shape),
        "python": platform.python_version(),
        "machine": _machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": " ".join([Path(sys.executable).name, "-m", *_module_and_arguments()]),
        "versions": versions,
    }


def _machine() -> str:
    """Returns the kind of processor, on which the last bits of results may depend."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return f"{platform.machine()}, {name.partition(':')[2].strip()}"
    return platform.machine()


def _module_and_arguments() -> list[str]:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]


def fingerprint(tree: Any) -> str:
    """Returns the SHA-256 of names, types, shapes and bytes of all arrays of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = sharding.to_host(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Metrics:
    """The lines of `metrics.jsonl`, the losses of all steps, and a TensorBoard log if asked for.

    Use it in a `with`. What is of steps after `step` is dropped when opened: it is of work that was
    lost, and is done again. Of several processes one writes.

    Raises:
      ImportError: TensorBoard is asked for, and tensorboardX is not installed.
    """

    def __init__(self, workdir: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = workdir / "metrics.jsonl"
        self.lines = [line for line in _lines(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        first = jax.process_index() == 0
        self._file = self.path.open("a", buffering=1) if first else None
        self._losses, self._known = _open_losses(workdir, step) if first else None, step
        self._board = _tensorboard(workdir / "tensorboard") if tensorboard and first else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._losses, self._board):
            if file:
                file.close()

    def keep(self, step: int, losses: np.ndarray) -> None:
        """Appends those of the losses of the last steps up to `step` that are not kept yet."""
        new = losses[len(losses) - (step - self._known) :]
        self._known = step
        if self._losses:
            self._losses.write(new.astype("<f4").tobytes())
            self._losses.flush()

    def write(self, *, step: int, losses: np.ndarray, **values: Any) -> None:
        """Appends a line, and the losses as `keep` does."""
        self.keep(step, losses)
        line = {"step": step, **values}
        self.lines.append(line)
        if self._file:
            self._file.write(json.dumps(line) + "\n")
        for name, value in values.items() if self._board else ():
            each = (
                {name: value}
                if not isinstance(value, list)
                else {f"{name}/{i}": part for i, part in enumerate(value) if part is not None}
            )
            for label, number in each.items():
                self._board.add_scalar(label, number, step)


def _open_losses(workdir: Path, step: int) -> BinaryIO:
    path = workdir / "losses.f32"
    path.touch()
    file = path.open("r+b")
    known = file.seek(0, os.SEEK_END) // 4
    file.truncate(4 * min(step, known))
    file.seek(0, os.SEEK_END)
    # Of steps whose loss was lost, or never kept by an earlier version: not a number.
    file.write(np.full(max(0, step - known), np.nan, "<f4").tobytes())
    return file


def read_losses(workdir: Path) -> np.ndarray:
    """Returns the loss of each step so far, float32; not a number where it was not kept."""
    path = workdir / "losses.f32"
    if not path.exists():
        return np.zeros(0, np.float32)
    content = path.read_bytes()
    return np.frombuffer(content[: len(content) // 4 * 4], "<f4")


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'train.tensorboard needs tensorboardX: pip install "jaxdiff[tensorboard]"'
        ) from error
    return SummaryWriter(str(folder))


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`; none if there are none yet."""
    return _lines(workdir / "metrics.jsonl")


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
