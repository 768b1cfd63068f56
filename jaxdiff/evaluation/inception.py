"""The Inception-V3 network of published FIDs, Inception Scores and KIDs, in Flax.

It is the network of Szegedy et al. 2015 as it was released for TensorFlow on 2015-12-05, which
Heusel et al. 2017 took the features from and pytorch-fid, torch-fidelity and clean-fid carry on.
Other Inception-V3s differ: this one has 1008 outputs, its average pools do not count the padding,
and the last block pools by the maximum.

The weights are in a public file, `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid's releases;
its tensors, by name, are what `from_tensors` reads. Nothing here downloads.

    params = inception.from_tensors(tensors)
    features = inception.extract(params, images).features   # (N, 2048), for FID and KID

What an image goes through before the network changes a FID in its first digits. pytorch-fid,
torch-fidelity and the original bring it to 299 x 299 by bilinear interpolation without
anti-aliasing, on two different grids, see `prepare`; clean-fid's own resize is a third, and not
here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.evaluation import _images
from jaxdiff.evaluation.batches import map_batches
from jaxdiff.evaluation.inception_network import InceptionV3, Outputs, init

SIZE = 299
RESIZES = ("pytorch", "tensorflow")

_IGNORED = re.compile(r"^AuxLogits\.|\.num_batches_tracked$")  # used in training only


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Returns the names of the tensors that `from_tensors` needs, and their shapes."""
    return {name: _file_shape(leaf.shape) for name, path, leaf in _layout()}


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Makes the parameters from the tensors of the public file.

    Args:
      tensors: by their names in PyTorch, such as `Mixed_5b.branch1x1.conv.weight`, of the shapes
        of `tensor_shapes()`. `num_batches_tracked` of any layer, and `AuxLogits`, which only
        training uses, may be there and are ignored.

    Returns:
      The parameters of `InceptionV3`, float32.

    Raises:
      ValueError: a tensor is missing, unknown, of another shape, or does not hold finite numbers.
    """
    layout = _layout()
    known = {name for name, _, _ in layout}
    missing = [name for name, _, _ in layout if name not in tensors]
    extra = [name for name in tensors if name not in known and not _IGNORED.search(name)]
    if missing or extra:
        parts = [_listed("lack", missing), _listed("have the unknown", extra)]
        raise ValueError(
            f"these tensors are not those of the FID Inception-V3: they "
            f"{' and '.join(part for part in parts if part)}"
        )
    params: dict[str, Any] = {}
    for name, path, leaf in layout:
        value = np.asarray(tensors[name])
        expected = _file_shape(leaf.shape)
        if value.shape != expected:
            raise ValueError(f"tensor {name} must have the shape {expected}, got {value.shape}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"tensor {name} must be floating, got {value.dtype}")
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"tensor {name} has NaN or infinite values: is the file damaged?")
        if path[-1] == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        place = params
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = jnp.asarray(value)
    return params


def prepare(images: jax.Array, resize: str = "pytorch") -> jax.Array:
    """Brings images to the size and range of the network.

    Args:
      images: `(N, H, W, C)` of 3 channels, or of 1, which is then repeated. Integers of uint8 in
        0 .. 255, or floating in [-1, 1]. Published scores are of 8-bit images: save or round
        samples first.
      resize: which grid. `"pytorch"` is pytorch-fid's: pixels are areas, and the picture's edges
        stay its edges; values go to 2x/255 - 1. `"tensorflow"` is that of TensorFlow 1, of the
        first FIDs (TTUR) and of torch-fidelity: pixel i of the result is at i·H/299, so that the
        picture moves up and left by up to half a pixel; values go to (x - 128)/128.

    Returns:
      Images `(N, 299, 299, 3)`, float32.

    Raises:
      ValueError: the shape, the type or the resize is another.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must have the shape (N, H, W, 3 or 1), got {images.shape}")
    if images.dtype == jnp.uint8:
        x = jnp.asarray(images, jnp.float32)
    elif jnp.issubdtype(images.dtype, jnp.floating):
        x = (jnp.asarray(images, jnp.float32) + 1) * 127.5
    else:
        raise ValueError(
            f"images must be uint8 in 0 .. 255 or floating in [-1, 1], got {images.dtype}"
        )
    if resize == "pytorch":
        x = 2 * _resized(x / 255, resize) - 1
    else:
        x = (_resized(x, resize) - 128) / 128
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def extract(
    params: Any,
    images: np.ndarray,
    *,
    resize: str = "pytorch",
    batch_size: int = 64,
    devices: Sequence[jax.Device] | None = None,
) -> Outputs:
    """Computes features and logits of images; the same for any batch size and number of devices.

    Args:
      params: from `from_tensors`.
      images: as for `prepare`.
      resize: as for `prepare`.
      batch_size: how many images are sent to the devices at a time.
      devices: which; all of this process by default.

    Returns:
      Features and logits, NumPy arrays.

    Raises:
      ValueError: as `prepare`, or values are NaN or far from [-1, 1].
    """
    images = _images.read(images)
    jax.eval_shape(functools.partial(prepare, resize=resize), images[:1])  # before any transfer
    apply = _PREPARED[resize]
    return map_batches(apply, params, images, batch_size=batch_size, unit=8, devices=devices)


def _apply(resize: str, params: Any, images: jax.Array) -> Outputs:
    return InceptionV3().apply({"params": params}, prepare(images, resize))


_PREPARED = {resize: functools.partial(_apply, resize) for resize in RESIZES}


def _resized(x: jax.Array, resize: str) -> jax.Array:
    """Interpolates `(N, H, W, C)` bilinearly to 299 x 299."""
    for axis in (1, 2):
        size = x.shape[axis]
        # In float32, as there: the places between two pixels are known to 1e-5 only.
        scale = np.float32(size) / np.float32(SIZE)
        at = np.arange(SIZE, dtype=np.float32)
        if resize == "pytorch":
            half = np.float32(0.5)
            at = np.maximum((at + half) * scale - half, 0)
        else:
            at = at * scale
        low = np.minimum(at.astype(np.int32), size - 1)
        high = np.minimum(low + 1, size - 1)
        weight = np.expand_dims(at - low.astype(np.float32), [d for d in range(4) if d != axis])
        first, second = (jnp.take(x, i, axis=axis) for i in (low, high))
        x = first + (second - first) * weight
    return x


@functools.cache
def _layout() -> list[tuple[str, tuple[str, ...], jax.ShapeDtypeStruct]]:
    """Returns for each parameter its name in the file, its path and its shape here."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    leaves, _ = jax.tree.flatten_with_path(shapes)
    paths = [(tuple(str(part.key) for part in path), leaf) for path, leaf in leaves]
    return [(".".join((*path[:-1], _NAMES[path[-1]])), path, leaf) for path, leaf in paths]


_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}


def _file_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in the file: kernels are there by outputs, inputs, height, width."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _listed(verb: str, names: list[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{verb} {', '.join(names[:most])}{more}"
