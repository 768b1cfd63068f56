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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Array:
    """Convolves as `lax.conv_general_dilated` does, for `nn.Conv`; faster on CPUs where it can.

    Args:
      x: `(B, *spatial, C)`.
      kernel: `(*widths, C, features)`.
      strides: of each axis.
      padding: of each axis, before and after.
      **options: of `lax.conv_general_dilated`; the faster way is open where they ask for nothing
        but `dimension_numbers` of channels last. Whoever asks for a precision, here or by
        `jax.default_matmul_precision`, gets plain products.
    """
    same = tuple(strides) == (1, 1) and [tuple(pad) for pad in padding] == [(1, 1), (1, 1)]
    if same and _is_plain(x, kernel, **options) and _pays(x, kernel):
        return _winograd_on_cpu(x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _is_plain(x: Array, kernel: Array, dimension_numbers: Any = None, **others: Any) -> bool:
    """Returns whether options of a convolution ask for no more than channels last."""
    if x.ndim != 4 or kernel.ndim != 4 or jax.config.jax_default_matmul_precision is not None:
        return False
    shapes = x.shape, kernel.shape
    layouts = (lax.conv_dimension_numbers(*shapes, each) for each in (dimension_numbers, _LAYOUT))
    # None, or what is the same: one group, and a dilation of 1 along each axis.
    asks = any(value not in (None, 1, (1, 1), [1, 1]) for value in others.values())
    return len(set(layouts)) == 1 and not asks


def _pays(x: Array, kernel: Array) -> bool:
    """Returns whether a CPU is faster so (measured: `experiments/benchmarks.md`)."""
    if x.ndim != 4 or kernel.shape[:2] != (3, 3) or x.shape[1] % 2 or x.shape[2] % 2:
        return False
    if x.dtype != jnp.float32 or kernel.dtype != jnp.float32 or kernel.shape[2] != x.shape[3]:
        return False
    positions, channels = math.prod(x.shape[:3]), min(kernel.shape[2:])
    # Else transforming the activations, or else the kernel, takes longer than is won.
    return (channels >= 128 and positions >= 512) or (channels >= 32 and 512 <= positions <= 4096)


@jax.custom_jvp
def _winograd_on_cpu(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x, kernel, cpu=winograd, default=_direct)


@_winograd_on_cpu.defjvp
def _jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # A convolution is linear in both. In the kernel, a plain one is faster.
    (x, kernel), (dx, dkernel) = primals, tangents
    in_x = lax.platform_dependent(dx, kernel, cpu=_winograd_to_transpose, default=_direct)
    return _winograd_on_cpu(x, kernel), in_x + _direct(x, dkernel)


def _winograd_to_transpose(x: Array, kernel: Array) -> Array:
    """Returns `winograd(x, kernel)`, in a form whose transpose, which JAX derives, is fast, too."""
    y = jax.eval_shape(winograd, x, kernel)
    return jax.linear_transpose(lambda dy: winograd_transposed(dy, kernel), y)(x)[0]


def _direct(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=_LAYOUT)


def winograd(x: Array, kernel: Array) -> Array:
    """Convolves `(B, H, W, C)`, H and W even, with `(3, 3, C, features)`; the size is kept.

    By eq. (1) along both axes; outside of x there are zeros.
    """
    return _correlate(x, _transform_filters(kernel))


def winograd_transposed(dy: Array, kernel: Array) -> Array:
    """Returns the gradient of x of `winograd(x, kernel)`, from that of its result.

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
