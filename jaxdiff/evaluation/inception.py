"""The Inception-V3 network of published FIDs, Inception Scores and KIDs, in Flax.

It is the network of Szegedy et al. 2015 as it was released for TensorFlow on 2015-12-05, which
Heusel et al. 2017 took the features from and pytorch-fid, torch-fidelity and clean-fid carry on.
Other Inception-V3s differ: this one has 1008 outputs, its average pools do not count the padding,
and the last block pools by the maximum.

The weights are in a public file, `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid's releases;
its tensors, by name, are what `from_tensors` reads. Nothing here downloads.

    params = inception.from_tensors(tensors)
    features = inception.extract(params, images).features   # (N, 2048), for FID and KID

What an image goes through before the network changes a FID in its first digits. All in use bring
it to 299 x 299 by bilinear interpolation without anti-aliasing, on two grids, see `prepare`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.evaluation.batches import map_batches

SIZE = 299
NUM_FEATURES = 2048
NUM_OUTPUTS = 1008
RESIZES = ("pytorch", "tensorflow")

_EPSILON = 1e-3
_IGNORED = re.compile(r"^AuxLogits\.|\.num_batches_tracked$")  # used in training only


class Outputs(NamedTuple):
    """What the network says of images.

    Attributes:
      features: of its last pooling, `(N, 2048)`, at least 0.
      logits: of its 1008 outputs, `(N, 1008)`.
      logits_unbiased: those without the bias of the last layer, `(N, 1008)`: published Inception
        Scores are of `softmax(logits_unbiased)`.
    """

    features: jax.Array
    logits: jax.Array
    logits_unbiased: jax.Array


class InceptionV3(nn.Module):
    """The network: images `(N, H, W, 3)` in [-1, 1], H and W at least 75 and usually 299.

    Its layers have the names of the public file. All is computed in float32, also where the
    default is less.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> Outputs:
        """Returns features and logits, float32."""
        x = _Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _max_pool(x, 2, "VALID")
        x = _Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _max_pool(x, 2, "VALID")
        x = _BlockA(32, name="Mixed_5b")(x)
        x = _BlockA(64, name="Mixed_5c")(x)
        x = _BlockA(64, name="Mixed_5d")(x)
        x = _BlockB(name="Mixed_6a")(x)
        x = _BlockC(128, name="Mixed_6b")(x)
        x = _BlockC(160, name="Mixed_6c")(x)
        x = _BlockC(160, name="Mixed_6d")(x)
        x = _BlockC(192, name="Mixed_6e")(x)
        x = _BlockD(name="Mixed_7a")(x)
        x = _BlockE(_average_pool, name="Mixed_7b")(x)
        x = _BlockE(functools.partial(_max_pool, stride=1, padding="SAME"), name="Mixed_7c")(x)
        features = x.mean((1, 2))
        logits, logits_unbiased = _Dense(NUM_OUTPUTS, name="fc")(features)
        return Outputs(features, logits, logits_unbiased)


def init(key: jax.Array) -> dict[str, Any]:
    """Makes random weights, as `from_tensors` makes true ones: for tests, not for scores."""
    return InceptionV3().init(key, jnp.zeros((1, 75, 75, 3)))["params"]


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Returns the names of the tensors that `from_tensors` needs, and their shapes."""
    return {name: _SHAPE[path[-1]](leaf.shape) for name, path, leaf in _layout()}


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
        expected = _SHAPE[path[-1]](leaf.shape)
        if value.shape != expected:
            raise ValueError(f"tensor {name} must have the shape {expected}, got {value.shape}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"tensor {name} must be floating, got {value.dtype}")
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"tensor {name} has NaN or infinite values: is the file damaged?")
        if path[-1] == "kernel":  # outputs, inputs, height, width there
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
      ValueError: as `prepare`.
    """
    jax.eval_shape(functools.partial(prepare, resize=resize), images[:1])  # before any transfer
    apply = _PREPARED[resize]
    return map_batches(apply, params, images, batch_size=batch_size, unit=16, devices=devices)


def _apply(resize: str, params: Any, images: jax.Array) -> Outputs:
    return InceptionV3().apply({"params": params}, prepare(images, resize))


_PREPARED = {resize: functools.partial(_apply, resize) for resize in RESIZES}


class _Conv(nn.Module):
    """Convolution, normalisation by stored statistics, ReLU."""

    channels: int
    size: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.channels,
            self.size,
            self.stride,
            self.padding,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        return nn.relu(_Normalization(name="bn")(x))


class _Normalization(nn.Module):
    """Batch normalisation in inference."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        variance = self.param("variance", nn.initializers.ones, shape)
        scale = scale * jax.lax.rsqrt(variance + _EPSILON)
        scale, bias, mean = (a.reshape(1, 1, 1, -1) for a in (scale, bias, mean))
        return (x - mean) * scale + bias


class _Dense(nn.Module):
    """A dense layer, with and without its bias."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        y = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return y + bias[None], y


class _BlockA(nn.Module):
    pool_channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = _Conv(64, (1, 1), name="branch1x1")(x)
        b = _Conv(48, (1, 1), name="branch5x5_1")(x)
        b = _Conv(64, (5, 5), name="branch5x5_2")(b)
        c = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        c = _Conv(96, (3, 3), name="branch3x3dbl_2")(c)
        c = _Conv(96, (3, 3), name="branch3x3dbl_3")(c)
        d = _Conv(self.pool_channels, (1, 1), name="branch_pool")(_average_pool(x))
        return jnp.concatenate([a, b, c, d], -1)


class _BlockB(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = _Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        b = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        b = _Conv(96, (3, 3), name="branch3x3dbl_2")(b)
        b = _Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(b)
        return jnp.concatenate([a, b, _max_pool(x, 2, "VALID")], -1)


class _BlockC(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.channels
        a = _Conv(192, (1, 1), name="branch1x1")(x)
        b = _Conv(c, (1, 1), name="branch7x7_1")(x)
        b = _Conv(c, (1, 7), name="branch7x7_2")(b)
        b = _Conv(192, (7, 1), name="branch7x7_3")(b)
        d = _Conv(c, (1, 1), name="branch7x7dbl_1")(x)
        d = _Conv(c, (7, 1), name="branch7x7dbl_2")(d)
        d = _Conv(c, (1, 7), name="branch7x7dbl_3")(d)
        d = _Conv(c, (7, 1), name="branch7x7dbl_4")(d)
        d = _Conv(192, (1, 7), name="branch7x7dbl_5")(d)
        e = _Conv(192, (1, 1), name="branch_pool")(_average_pool(x))
        return jnp.concatenate([a, b, d, e], -1)


class _BlockD(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = _Conv(192, (1, 1), name="branch3x3_1")(x)
        a = _Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(a)
        b = _Conv(192, (1, 1), name="branch7x7x3_1")(x)
        b = _Conv(192, (1, 7), name="branch7x7x3_2")(b)
        b = _Conv(192, (7, 1), name="branch7x7x3_3")(b)
        b = _Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(b)
        return jnp.concatenate([a, b, _max_pool(x, 2, "VALID")], -1)


class _BlockE(nn.Module):
    pool: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = _Conv(320, (1, 1), name="branch1x1")(x)
        b = _Conv(384, (1, 1), name="branch3x3_1")(x)
        b = [
            _Conv(384, (1, 3), name="branch3x3_2a")(b),
            _Conv(384, (3, 1), name="branch3x3_2b")(b),
        ]
        c = _Conv(448, (1, 1), name="branch3x3dbl_1")(x)
        c = _Conv(384, (3, 3), name="branch3x3dbl_2")(c)
        c = [
            _Conv(384, (1, 3), name="branch3x3dbl_3a")(c),
            _Conv(384, (3, 1), name="branch3x3dbl_3b")(c),
        ]
        d = _Conv(192, (1, 1), name="branch_pool")(self.pool(x))
        return jnp.concatenate([a, *b, *c, d], -1)


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: jax.Array, stride: int, padding: str) -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


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
    return [(_name(path), path, leaf) for path, leaf in paths]


def _name(path: tuple[str, ...]) -> str:
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean"}
    names["variance"] = "running_var"
    return ".".join((*path[:-1], names.get(path[-1], path[-1])))


def _torch_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


_SHAPE = {name: tuple for name in ("scale", "bias", "mean", "variance")} | {"kernel": _torch_kernel}


def _listed(verb: str, names: list[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{verb} {', '.join(names[:most])}{more}"
