"""The layers of Inception-V3, see `jaxdiff.evaluation.inception`, named as in the public file."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

NUM_FEATURES = 2048
NUM_OUTPUTS = 1008
_EPSILON = 1e-3


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
    """35 x 35: 1 x 1, 5 x 5, two 3 x 3, average pool."""

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
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = _Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        b = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        b = _Conv(96, (3, 3), name="branch3x3dbl_2")(b)
        b = _Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(b)
        return jnp.concatenate([a, b, _max_pool(x, 2, "VALID")], -1)


class _BlockC(nn.Module):
    """17 x 17, with 7 x 7 kernels as 1 x 7 and 7 x 1."""

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
    """17 x 17 to 8 x 8."""

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
    """8 x 8, with 3 x 3 kernels as 1 x 3 beside 3 x 1; which pool, differs."""

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
