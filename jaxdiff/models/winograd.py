"""Convolutions of width 3 with fewer products, on CPUs: Winograd's F(2 x 2, 3 x 3).

Two neighbouring results of a filter g of width 3 need four products instead of six. With d the four
values under them,

    y = A' ((G g) * (B' d)),                                                               (1)

    B' d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3),
    G g  = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2),
    A' m = (m0 + m1 + m2, m1 - m2 - m3).

Along both axes that is 16 products instead of 36 for 2 x 2 results, and with channels 16 matrix
products. XLA's convolutions on CPUs are slower than that for many shapes; on accelerators they are
not, and stay. The results differ in the last bits.

Reference:
  Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def pays(x: Array, kernel: Array) -> bool:
    """Returns whether a CPU is faster so (measured: `experiments/benchmarks.md`)."""
    if x.ndim != 4 or kernel.shape[:2] != (3, 3) or x.shape[1] % 2 or x.shape[2] % 2:
        return False
    if x.dtype != jnp.float32 or kernel.dtype != jnp.float32 or kernel.shape[2] != x.shape[3]:
        return False
    positions, channels = math.prod(x.shape[:3]), min(kernel.shape[2:])
    # Else transforming the activations, or else the kernel, takes longer than is won.
    return (channels >= 128 and positions >= 512) or (channels >= 32 and 512 <= positions <= 4096)


@jax.jit
def convolve(x: Array, kernel: Array) -> Array:
    """Convolves `(B, H, W, C)`, H and W even, with `(3, 3, C, features)`; the size is kept.

    By eq. (1) along both axes; outside of x there are zeros.
    """
    return _correlate(x, _transform_filters(kernel))


@jax.jit
def gradient(dy: Array, kernel: Array) -> Array:
    """Returns the gradient of x of `convolve(x, kernel)`, from that of its result.

    It is a convolution with the filters turned around. Turned around along an axis, G g is itself
    in the order 3, 1, 2, 0: nothing is transformed anew.
    """
    order = (3, 1, 2, 0)
    filters = _transform_filters(kernel)
    return _correlate(dy, [[filters[i][j].T for j in order] for i in order])


def _correlate(x: Array, filters: Sequence[Sequence[Array]]) -> Array:
    """Returns eq. (1) along both axes, for filters transformed already, 4 x 4 matrices."""
    batch, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    data = [_transform_data(rows, 2) for rows in _transform_data(x, 1)]
    products = [
        [d @ g for d, g in zip(*row, strict=True)] for row in zip(data, filters, strict=True)
    ]
    columns = [_transform_back(column) for column in zip(*products, strict=True)]
    rows = [_transform_back(row) for row in zip(*columns, strict=True)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
    return y.reshape(batch, height, width, -1)


def _transform_filters(kernel: Array) -> list[tuple[Array, ...]]:
    return [_transform_filter(list(row)) for row in _transform_filter(list(kernel))]


def _transform_data(x: Array, axis: int) -> tuple[Array, ...]:
    """Returns B' of each four neighbours, two apart, along an axis."""
    last = x.shape[axis] - 3
    d = [lax.slice_in_dim(x, k, k + last, 2, axis) for k in range(4)]
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _transform_filter(g: Sequence[Array]) -> tuple[Array, ...]:
    """Returns G of three."""
    outer, inner = 0.5 * (g[0] + g[2]), 0.5 * g[1]
    return g[0], outer + inner, outer - inner, g[2]


def _transform_back(m: Sequence[Array]) -> tuple[Array, Array]:
    """Returns A' of four."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]
