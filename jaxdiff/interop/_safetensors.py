"""The safetensors format: 8 bytes of length, a JSON header of that length, the tensors' bytes.

The header maps each name to a dtype, a shape, and where the bytes begin and end behind the header.
The format's own rules are enforced: no byte is in two tensors or in none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.interop._files import parse_json, replace

# In the order in which the format's own library sorts them.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_MOST_HEADER = 100_000_000  # the format's own limit


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file; see `tensors.read_tensors`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MOST_HEADER):
            raise ValueError(
                f"{path}: its header is said to be {length} bytes long, but the file has {size} "
                "bytes: it is cut off, or no safetensors file"
            )
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: its header must be JSON: {error}") from error
        if not isinstance(header, dict):
            raise ValueError(f"{path}: its header must be a JSON object")
        header.pop("__metadata__", None)
        spans = {name: _span(path, name, entry) for name, entry in header.items()}
        _check_spans(path, spans, size - 8 - length)
        data = np.fromfile(file, np.uint8)
    data.flags.writeable = False
    return {
        name: data[begin:end].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in spans.items()
    }


def write(path: Path, tensors: Mapping[str, np.ndarray], words: Mapping[str, str] | None) -> None:
    """Writes a safetensors file; see `tensors.write_tensors`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    arrays = {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"the name of a tensor must be a string, got {name!r}")
        if array.dtype not in names:
            raise ValueError(
                f"tensor {name!r} must have a dtype among {', '.join(map(str, names))}, got "
                f"{array.dtype}: convert it first"
            )
        arrays[name] = array
    header, end = {}, 0
    if words is not None:
        if not all(isinstance(word, str) for item in words.items() for word in item):
            raise ValueError(f"metadata must map strings to strings, got {dict(words)!r}")
        header["__metadata__"] = dict(words)
    # Wide ones first, so that each is aligned.
    ranks = list(names)
    order = sorted(arrays, key=lambda name: (-ranks.index(arrays[name].dtype), name))
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": names[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = [len(text).to_bytes(8, "little"), text]
    replace(path, [*start, *(np.ascontiguousarray(arrays[name]).tobytes() for name in order)])


def _span(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Reads what the header says of one tensor: dtype, shape, begin and end."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        counts = [*shape, begin, end]
        fits = set(entry) == {"dtype", "shape", "data_offsets"} and isinstance(dtype, str)
        fits = fits and all(type(count) is int and 0 <= count < 2**48 for count in counts)
        fits = fits and len(shape) <= 32 and math.prod(max(n, 1) for n in shape) < 2**48
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"{path}: tensor {name!r} must have a dtype, a shape and two data_offsets, got "
            f"{str(entry)[:200]}"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"{path}: tensor {name!r} must have a dtype among {', '.join(DTYPES)}, got {dtype!r}"
        )
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{path}: tensor {name!r}, {dtype} of shape {shape}, does not fill its "
            f"{end - begin} bytes, from {begin} to {end}"
        )
    return DTYPES[dtype], tuple(shape), begin, end


def _check_spans(path: Path, spans: Mapping[str, tuple], size: int) -> None:
    """Raises ValueError unless the tensors lie behind one another and fill the file."""
    reached, last = 0, "the header"
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if end > size:
            raise ValueError(
                f"{path}: tensor {name!r} ends at byte {end} of {size}: the file is cut off"
            )
        if begin != reached:
            what = "overlaps" if begin < reached else "leaves a gap behind"
            raise ValueError(
                f"{path}: tensor {name!r}, from byte {begin} to {end}, {what} {last}, which ends "
                f"at {reached}"
            )
        reached, last = end, f"tensor {name!r}"
    if reached != size:
        raise ValueError(f"{path}: {size - reached} bytes behind {last} belong to no tensor")
