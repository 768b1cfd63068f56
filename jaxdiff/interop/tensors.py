"""Files of named tensors: safetensors, and what PyTorch saves, read without unpickling.

What kind of file it is, is told by what stands in it:

| begins with | is |
| --- | --- |
| the length of a header, then `{` | safetensors |
| `{` | the index of a sharded checkpoint: its files are safetensors or PyTorch's |
| a zip archive's signature | PyTorch, 1.6 and later |
| a pickle's protocol | PyTorch, the format before |

Whatever a file claims is checked before it is used, and nothing in it is executed: of pickles, see
`_pickles`. Neither PyTorch nor the safetensors package is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxdiff.interop import _safetensors, _torch_files
from jaxdiff.interop._files import parse_json


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all tensors of a file by name.

    Args:
      path: a safetensors file, a file of `torch.save` in either format, or the index
        (`*.index.json`) of a checkpoint in several such files beside it. In what PyTorch saved,
        tensors are looked for in nested dictionaries and lists, whose keys are joined by dots;
        numbers, strings and None are left out.

    Returns:
      The tensors in the file's order, with their dtypes; bfloat16 and float8 are those of
      ml_dtypes. They are read-only, and may share memory where they did when they were saved.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is none of these, is damaged, contradicts itself, or holds something
        else than tensors, or a pickle is named as if it were safetensors; says which file and, if
        it is about one, which tensor.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    is_zip, is_pickle = start.startswith(b"PK\x03\x04"), start.startswith(b"\x80")
    # A header of 128 bytes also begins with the byte that begins a pickle.
    if start[8:9] == b"{" and not is_zip:
        return _safetensors.read(path)
    if (is_zip or is_pickle) and path.suffix == ".safetensors":
        raise ValueError(
            f"{path} is no safetensors file but a {'zip archive' if is_zip else 'pickle'}: whoever "
            "named it may mean to have it executed; get the checkpoint from a source you trust"
        )
    if is_zip:
        return _torch_files.read_zip(path)
    if is_pickle:
        return _torch_files.read_old(path)
    if start.lstrip().startswith(b"{"):
        return _read_shards(path)
    raise ValueError(
        f"{path} must be a safetensors file, an index of such files or a file of torch.save, but "
        f"begins with {start!r}: it may be damaged, or a pointer of git-lfs instead of the file"
    )


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file: whole, or not at all.

    Args:
      path: the file; an older one of that name is replaced once the new one is complete.
      tensors: arrays by name; each is written in its own dtype.
      metadata: words to keep along with them.

    Raises:
      ValueError: a name or a dtype cannot be written, or the metadata are not strings; says which.
    """
    _safetensors.write(Path(path), tensors, metadata)


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of all files that an index names."""
    try:
        files = parse_json(path.read_bytes())["weight_map"]
        named = all(isinstance(name, str) for name in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be the index of a sharded checkpoint, with a weight_map from tensors to "
            f"files: {error!r}"
        ) from error
    if not named:
        raise ValueError(f"{path}: the weight_map must map names of tensors to names of files")
    for name, file in files.items():
        # Not somewhere else on the disk, and no index again.
        if not re.fullmatch(r"[\w\- ][\w\-. ]*", file) or file.endswith(".json"):
            raise ValueError(f"{path}: tensor {name!r} must be in a file beside it, got {file!r}")
    shards = {}
    for file in dict.fromkeys(files.values()):
        if not (path.parent / file).is_file():
            raise ValueError(f"{path} names {file}, which is not beside it: get that file, too")
        shards[file] = read_tensors(path.parent / file)
        for name in shards[file]:
            if files.get(name) != file:
                raise ValueError(
                    f"{path.parent / file}: tensor {name!r} is not expected here: {path.name} has "
                    f"it in {files.get(name, 'no file')}"
                )
    for name, file in files.items():
        if name not in shards[file]:
            raise ValueError(f"{path.parent / file}: tensor {name!r} is missing")
    return {name: shards[file][name] for name, file in files.items()}
