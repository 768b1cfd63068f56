"""What a network is told beside x and the noise level: labels, vectors, sequences, images, masks.

A network with activations h and an embedding e of the noise level hears of them so:

    label:     e <- e + E[label]                                                           (1)
    vector:    e <- e + W_1 silu(W_0 vector)                                               (2)
    sequence:  h <- h + W_o softmax(q(h) k(tokens)' / sqrt(d)) v(tokens)                   (3)
    image:     x <- (x, image), one behind the other along the channels                    (4)
    mask:      h <- mask h wherever a layer looks at more than one position                (5)

(1) is Dhariwal & Nichol 2021, section 3.1; (3) Rombach et al. 2022, section 3.3; (4) Saharia et
al. 2021 (SR3), section 2.4. This module reads conditions and refuses what does not fit a network;
what it then does with them is the network's part.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.models._checks import check, describe

Array = jax.Array


class Condition(NamedTuple):
    """What a network is told; None for what it is not told of.

    Attributes:
      label: int `(B,)`.
      vector: float `(B, D)`.
      sequence: float `(B, L, D)`: L tokens, whose order attention does not see.
      sequence_mask: bool or int `(B, L)`, 1 where a token counts; None means that all count.
      image: float `(B, *spatial, C)`, of the spatial size of x.
      mask: bool or int `(B, *spatial)`, 1 where there is data; None means everywhere.
    """

    label: Array | None = None
    vector: Array | None = None
    sequence: Array | None = None
    sequence_mask: Array | None = None
    image: Array | None = None
    mask: Array | None = None


class _Kind(NamedTuple):
    """What may stand under one key of a condition."""

    field: str | None  # the field of the network that declares it; None needs no declaration
    words: str
    dtypes: tuple[Any, ...]
    cure: str


_KINDS = {
    "label": _Kind(
        "num_classes",
        "int labels",
        (jnp.integer,),
        'pass one label per example (for "no label", the one you keep for it)',
    ),
    "vector": _Kind(
        "vector_dim", "floats", (jnp.floating,), "pass one vector of floats per example"
    ),
    "sequence": _Kind(
        "sequence_dim",
        "floats",
        (jnp.floating,),
        "pad to one length of at least 1, and say in sequence_mask which tokens count",
    ),
    "sequence_mask": _Kind(
        "sequence_dim",
        "bools or ints",
        (jnp.bool_, jnp.integer),
        "1 means that a token counts; a mask of floats becomes one of bools by `mask > 0.5`",
    ),
    "image": _Kind(
        "image_channels",
        "floats",
        (jnp.floating,),
        "scale it to [-1, 1] and resize it to the spatial size of x, e.g. by jax.image.resize",
    ),
    "mask": _Kind(
        None,
        "bools or ints",
        (jnp.bool_, jnp.integer),
        "1 means that a position of x has data, in all of its channels; a mask of floats becomes "
        "one of bools by `mask > 0.5`",
    ),
}


def read_condition(
    cond: Any,
    x: Array,
    *,
    num_classes: int | None = None,
    vector_dim: int | None = None,
    sequence_dim: int | None = None,
    image_channels: int | None = None,
) -> Condition:
    """Reads a condition and checks it against what a network declares; costs nothing at run time.

    Args:
      cond: a dict with the names of `Condition` as keys, or a `Condition`; or a bare array, which
        means labels; or None.
      x: what the network is applied to, `(B, *spatial, C)`.
      num_classes: how many labels there are, or None: the network takes no labels.
      vector_dim: the length of a vector, or None.
      sequence_dim: the length of a token, or None.
      image_channels: the channels of an image, or None.

    Returns:
      The condition: an array for all that is declared, where only the masks may be None still.
      The mask of x needs no declaration.

    Raises:
      ValueError: a key is unknown, what is declared is missing, what is not declared is given, or
        a shape or a dtype does not fit.

    Example:
      >>> x = jnp.zeros((2, 8, 8, 1))
      >>> read_condition({"label": jnp.array([3, 1])}, x, num_classes=10).label
      Array([3, 1], dtype=int32)
    """
    if isinstance(cond, Condition):
        cond = cond._asdict()
    bare = not isinstance(cond, Mapping)
    given = {"label": cond} if bare else dict(cond)
    for key in given:
        if key not in _KINDS:
            near = difflib.get_close_matches(str(key), _KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            check(False, "the keys of cond", f"among {', '.join(_KINDS)}", repr(key), hint)
    given = {key: jnp.asarray(value) for key, value in given.items() if value is not None}

    batch, spatial = x.shape[:1], x.shape[1:-1]
    tokens = given.get("sequence")
    length = (tokens is not None and tokens.ndim == 3 and tokens.shape[1]) or "L"
    declared = {
        "label": (num_classes, batch),
        "vector": (vector_dim, (*batch, vector_dim)),
        "sequence": (sequence_dim, (*batch, length, sequence_dim)),
        "sequence_mask": (sequence_dim, (*batch, length)),
        "image": (image_channels, (*batch, *spatial, image_channels)),
    }
    wanted = [key for key, (value, _) in declared.items() if value is not None]
    declared["mask"] = (1, (*batch, *spatial))  # by every network
    for key, (value, shape) in declared.items():
        name = "cond" if bare and key == "label" else f'cond["{key}"]'
        if value is None:
            _check_absent(name, key, given.get(key))
        elif key in given:
            _check_fits(name, key, given[key], shape)
        elif key not in ("sequence_mask", "mask"):
            _refuse_missing(name, key, value, shape, wanted)
    return Condition(**given)


def _check_absent(name: str, key: str, value: Array | None) -> None:
    """Raises ValueError if something is given that the network does not declare."""
    if value is not None:
        what = "labels" if key == "label" else describe(value)
        bare = ", and other conditions come in a dict" if name == "cond" else ""
        cure = f"leave it out, or set {_KINDS[key].field} to make a network of it{bare}"
        check(False, name, "None", what, cure)


def _check_fits(name: str, key: str, value: Array, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError if what is given is of another shape or dtype."""
    fits = any(jnp.issubdtype(value.dtype, dtype) for dtype in _KINDS[key].dtypes)
    fits = fits and value.shape == shape
    check(fits, name, _expected(key, shape), describe(value), _KINDS[key].cure)


def _refuse_missing(
    name: str, key: str, declared: int, shape: tuple[int | str, ...], wanted: list[str]
) -> None:
    """Raises ValueError for something that the network declares and was not given."""
    kind = _KINDS[key]
    expected = f"{_expected(key, shape)} as {kind.field} is {declared}"
    keys = "" if wanted == ["label"] else f"; cond is a dict with {', '.join(wanted)}"
    check(False, name, expected, None, f"{kind.cure}, or leave {kind.field} unset{keys}")


def _expected(key: str, shape: tuple[int | str, ...]) -> str:
    """Returns in words what is expected under a key."""
    return f"{_KINDS[key].words} of shape {shape}".replace("'L'", "L")


def sequence_positions(mask: Array, scale: float) -> Array:
    """Says of each entry of a sequence how far it is from its ends: an image for a network.

    A network of convolutions does not know where a sequence starts, nor where it ends. Entry k of
    the n that count is told

        (k / scale, (n - 1 - k) / scale, k == 0, k == n - 1)

    Args:
      mask: `(B, L)`, bool or int, 1 where there is data; entries without are not counted.
      scale: a number for all batches, such as the longest length in training: what an entry is told
        then does not depend on the padding.

    Returns:
      float32 `(B, L, 4)`, 0 off the mask.

    Raises:
      ValueError: the mask is not of that shape or dtype, or `scale` is not positive.

    Example:
      >>> sequence_positions(jnp.array([[1, 1, 0]]), 2.0).tolist()
      [[[0.0, 0.5, 1.0, 0.0], [0.5, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]]
    """
    mask = jnp.asarray(mask)
    kind = _KINDS["mask"]
    fits = mask.ndim == 2 and any(jnp.issubdtype(mask.dtype, dtype) for dtype in kind.dtypes)
    check(fits, "mask", f"{kind.words} of shape (B, L)", describe(mask), kind.cure)
    check(scale > 0, "scale", "positive", scale, "the longest length in training will do")
    mask = mask.astype(bool)
    before = jnp.cumsum(mask, axis=1) - 1
    after = jnp.sum(mask, axis=1, keepdims=True) - 1 - before
    columns = (before / scale, after / scale, before == 0, after == 0)
    table = jnp.stack([column.astype(jnp.float32) for column in columns], axis=-1)
    return jnp.where(mask[..., None], table, 0)
