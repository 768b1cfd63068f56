"""Our own parameters as safetensors and JSON: files that any library reads.

    NAME.safetensors   the parameters, a tensor each, named by their path: "params/conv_in/kernel"
    NAME.json          what they are, in words and numbers of your own

Example:
  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
  >>> save_params(path, {"params": {"dense": {"bias": np.ones(2, np.float32)}}}, {"step": 3})
  >>> load_params(path, {"params": {"dense": {"bias": np.zeros(2, np.float32)}}})
  {'params': {'dense': {'bias': Array([1., 1.], dtype=float32)}}}
  >>> load_metadata(path)
  {'step': 3}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.base import PyTree
from jaxdiff.interop._files import read_json, write_json
from jaxdiff.interop.tensors import read_tensors, write_tensors


def save_params(
    path: str | os.PathLike, params: PyTree, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes parameters, and the JSON file beside them; each whole or not at all.

    Args:
      path: the file, whose name ends in .safetensors.
      params: nested dictionaries of arrays.
      metadata: what JSON can hold; None means nothing.

    Raises:
      ValueError: the name ends otherwise, `params` is something else than nested dictionaries of
        arrays or has no leaves, a key is no string or has a "/", or `metadata` is no JSON.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    leaves = {name: np.asarray(leaf) for name, leaf in _named(params, "params").items()}
    if not leaves:
        raise ValueError("params must have at least one array, got none")
    metadata = {} if metadata is None else metadata
    try:
        fits = isinstance(metadata, Mapping) and json.loads(json.dumps(metadata)) == metadata
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            "metadata must be what JSON gives back as it is: dictionaries with strings as keys, "
            f"lists, strings, finite numbers, bools and None; got {repr(metadata)[:200]}"
        )
    write_tensors(path, leaves, {"format": "jaxdiff"})
    write_json(path.with_suffix(".json"), metadata)


def load_params(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Reads parameters that `save_params` wrote.

    Args:
      path: the file.
      like: nested dictionaries of arrays, or of `jax.ShapeDtypeStruct`: what is expected, such as
        `jax.eval_shape(model.init, ...)`.

    Returns:
      The parameters, of the structure, shapes and dtypes of `like`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or a parameter is missing, is one too many, or has another
        shape or dtype; names the file and the parameter.
    """
    expected, found = _named(like, "like"), read_tensors(path)
    for name, leaf in expected.items():
        if name not in found:
            raise ValueError(f"{path}: parameter {name!r} of shape {leaf.shape} is missing")
        for what in ("shape", "dtype"):
            want, got = getattr(leaf, what), getattr(found[name], what)
            if want != got:
                raise ValueError(f"{path}: parameter {name!r} must have {what} {want}, got {got}")
    if extra := [name for name in found if name not in expected]:
        raise ValueError(
            f"{path}: parameter {extra[0]!r} of shape {found[extra[0]].shape} is not expected "
            f"({len(extra)} such in all): is it another model's?"
        )

    def fill(part: PyTree, name: str) -> PyTree:
        if not isinstance(part, Mapping):
            return jnp.asarray(found[name])
        return {key: fill(inner, f"{name}/{key}" if name else key) for key, inner in part.items()}

    return fill(like, "")


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the metadata that `save_params` wrote beside parameters.

    Args:
      path: the file of the parameters, not of the metadata.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no JSON file.
    """
    return read_json(Path(path).with_suffix(".json"))


def _named(tree: PyTree, what: str, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries with their keys joined by "/"."""
    if not isinstance(tree, Mapping):
        array = hasattr(tree, "shape") and hasattr(tree, "dtype")
        if not array or not prefix or jax.dtypes.issubdtype(tree.dtype, jax.dtypes.extended):
            raise ValueError(
                f"{what} must be nested dictionaries of arrays, got {type(tree).__name__} at "
                f"{prefix!r}"
            )
        return {prefix: tree}
    leaves = {}
    for key, inner in tree.items():
        if not isinstance(key, str) or "/" in key or not key:
            raise ValueError(f"{what} must have keys that are words without '/', got {key!r}")
        leaves |= _named(inner, what, f"{prefix}/{key}" if prefix else key)
    return leaves
