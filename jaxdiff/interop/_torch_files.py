"""The two formats of `torch.save`: since version 1.6 a zip archive, before a row of pickles.

    zip:  NAME/data.pkl, what was saved; NAME/data/KEY, the bytes of storage KEY;
          NAME/byteorder; all of it uncompressed
    old:  a magic number, a version, the machine's byte order, what was saved, the keys of the
          storages, each a pickle; then for each key the number of entries and the entries' bytes

What was saved refers to storages; see `_pickles`.
"""

from __future__ import annotations

import errno
import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.interop import _pickles
from jaxdiff.interop._pickles import Storage, Tensor

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_DEPTH, _MOST_VALUES = 16, 1_000_000  # far above any checkpoint


def read_zip(path: Path) -> dict[str, np.ndarray]:
    """Reads a zip archive of torch.save; see `tensors.read_tensors`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise ValueError(f"{path}: the archive has two entries of the same name")
            if sum(info.file_size for info in entries.values()) > path.stat().st_size:
                raise ValueError(f"{path}: the entries of the archive overlap, or are compressed")
            roots = [name for name in entries if name.partition("/")[2] == "data.pkl"]
            if len(roots) != 1:
                raise ValueError(f"{path} must be a file of torch.save, but is another zip archive")
            prefix = roots[0].removesuffix("data.pkl")

            def entry(name: str) -> bytes:
                info = entries[prefix + name]
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise ValueError(f"{path}: {info.filename} is compressed, as torch never does")
                return archive.read(info)

            if prefix + "byteorder" in entries and entry("byteorder").strip() != b"little":
                raise ValueError(f"{path}: only bytes in little-endian order are read")
            saved = _follow(path, io.BytesIO(entry("data.pkl")))

            def load(storage: Storage) -> np.ndarray | None:
                name = f"data/{storage.key}"
                return np.frombuffer(entry(name), np.uint8) if prefix + name in entries else None

            return _tensors(path, saved, load)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} is damaged: it points to before its own beginning") from error


def read_old(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of torch.save from before version 1.6; see `tensors.read_tensors`."""
    with path.open("rb") as file:
        if _follow(path, file) != _MAGIC:
            raise ValueError(f"{path} must be a file of torch.save, but is another pickle")
        if (version := _follow(path, file)) != _VERSION:
            raise ValueError(f"{path}: the format must be of version {_VERSION}, got {version!r}")
        system = _follow(path, file)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError(f"{path}: only bytes in little-endian order are read")
        saved, keys = _follow(path, file), _follow(path, file)
        try:
            kinds = {tensor.storage.key: tensor.storage for _, tensor in _named(saved)}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        listed = isinstance(keys, list) and all(type(key) is str for key in keys)
        if not listed or len(set(keys)) < len(keys):
            raise ValueError(f"{path}: the keys of its storages must be strings, none twice")
        found = {}
        for key in keys:
            if key not in kinds:
                raise ValueError(f"{path}: no tensor uses storage {key!r}")
            size = int.from_bytes(file.read(8), "little")
            if size != kinds[key].size:
                raise ValueError(
                    f"{path}: storage {key} must have {kinds[key].size} entries, got {size}: the "
                    "file is damaged or cut off"
                )
            if size * kinds[key].dtype.itemsize > path.stat().st_size - file.tell():
                raise ValueError(f"{path}: the file is cut off in storage {key}")
            found[key] = np.fromfile(file, np.uint8, size * kinds[key].dtype.itemsize)
        if file.read(1):
            raise ValueError(f"{path}: bytes behind the last storage belong to no tensor")
    return _tensors(path, saved, lambda storage: found.get(storage.key))


def _follow(path: Path, file: Any) -> Any:
    """Follows the next pickle, and names the file in errors."""
    try:
        return _pickles.follow(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _named(saved: Any) -> list[tuple[str, Tensor]]:
    """Returns the tensors in nested dictionaries and lists, with their keys joined by dots."""
    tensors, visits = [], 0

    def visit(value: Any, names: tuple[str, ...]) -> None:
        nonlocal visits
        visits += 1
        if visits > _MOST_VALUES or len(names) > _MOST_DEPTH:
            # The same few dictionaries within each other, again and again.
            raise ValueError(f"it is nested too deeply or too often: {'.'.join(names)[:200]}")
        if isinstance(value, Tensor):
            tensors.append((".".join(names), value))
        elif isinstance(value, dict) or type(value) in (list, tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                visit(inner, (*names, str(key)))

    visit(saved, ())
    return tensors


def _tensors(
    path: Path, saved: Any, load: Callable[[Storage], np.ndarray | None]
) -> dict[str, np.ndarray]:
    """Makes the arrays of what was saved; `load` gives the bytes of a storage, None if missing."""
    tensors, loaded = {}, {}
    try:
        for name, tensor in _named(saved):
            if name in tensors:
                raise ValueError(f"tensor {name!r} stands there twice")
            if tensor.storage not in loaded:
                loaded[tensor.storage] = load(tensor.storage)
            tensors[name] = _array(name, tensor, loaded[tensor.storage])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not tensors:
        raise ValueError(f"{path}: there is no tensor in it")
    return tensors


def _array(name: str, tensor: Tensor, data: np.ndarray | None) -> np.ndarray:
    """Returns a tensor as a read-only array on the bytes of its storage."""
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if data is None:
        raise ValueError(f"tensor {name!r}: its storage {storage.key} is missing")
    itemsize = storage.dtype.itemsize
    if data.size != storage.size * itemsize:
        raise ValueError(
            f"tensor {name!r}: its storage {storage.key} must have {storage.size * itemsize} "
            f"bytes, got {data.size}: the file is damaged or cut off"
        )
    # An axis of one entry may have any stride.
    strides = tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    fits = len(shape) <= 32 and math.prod(max(n, 1) for n in shape) < 2**48
    if not fits or tensor.offset + extent * (0 not in shape) > storage.size:
        raise ValueError(
            f"tensor {name!r} of shape {shape}, strides {strides} and offset {tensor.offset} lies "
            f"outside of its storage {storage.key}, which has {storage.size} entries"
        )
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    return np.lib.stride_tricks.as_strided(
        data.view(storage.dtype)[tensor.offset :],
        shape,
        tuple(stride * itemsize for stride in strides),
        writeable=False,
    )
