"""Convolutions of channels last, with derivatives that a CPU computes fast wherever they stand.

XLA's fast convolutions on CPUs are of the layout NHWC, HWIO. Outside of loops it brings all others
to that layout, but in the body of a loop it computes them one number at a time: gradients, whose
layout as JAX derives them is another, take tens of times as long
(https://github.com/jax-ml/jax/issues/12868). Here they are written in that layout. With y the
convolution of x with a kernel k, along one axis of stride s and padding p before,

    y_i = sum_w k_w x_(s i + w - p),
    dx_j = sum_i k_(j - s i + p) dy_i,    dk_w = sum_i x_(s i + w - p) dy_i:               (1)

convolutions, too, of dy with s - 1 zeros between its values by k turned around, and of x by dy as a
kernel whose values lie s apart, where examples and channels change places.

So it is in reverse mode (training in microbatches, guidance by gradients, likelihoods) where there
is one device, or each computes its share by itself (`jax.shard_map`). In forward mode (`jax.jvp`)
it is slow in loops on a CPU, then: JAX takes one rule for both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxdiff.models import winograd

Array = jax.Array
Strides = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]


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
    if not _is_plain(x, kernel, **options):
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    pairs = tuple((int(before), int(after)) for before, after in padding)
    return _convolve(x, kernel, tuple(int(s) for s in strides), pairs)


def _is_plain(x: Array, kernel: Array, dimension_numbers: Any = None, **others: Any) -> bool:
    """Returns whether options of a convolution ask for no more than channels last."""
    if x.ndim < 3 or kernel.ndim != x.ndim or jax.config.jax_default_matmul_precision is not None:
        return False
    shapes, axes = (x.shape, kernel.shape), x.ndim - 2
    asked, last = (
        lax.conv_dimension_numbers(*shapes, each) for each in (dimension_numbers, _layout(axes))
    )
    # None, or what is the same: one group, and a dilation of 1 along each axis.
    nothing = (None, 1, (1,) * axes, [1] * axes)
    return asked == last and all(value in nothing for value in others.values())


def _layout(axes: int) -> tuple[str, str, str]:
    spatial = "HWD"[:axes]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


def _direct(x: Array, kernel: Array, strides: Strides, padding: Padding, **options: Any) -> Array:
    layout = _layout(x.ndim - 2)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, **options
    )


def _by_winograd(x: Array, kernel: Array, strides: Strides, padding: Padding) -> bool:
    return strides == (1, 1) and padding == ((1, 1), (1, 1)) and winograd.pays(x, kernel)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    direct = functools.partial(_direct, strides=strides, padding=padding)
    if _by_winograd(x, kernel, strides, padding):
        return lax.platform_dependent(x, kernel, cpu=winograd.convolve, default=direct)
    return direct(x, kernel)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _jvp(
    strides: Strides,
    padding: Padding,
    primals: tuple[Array, Array],
    tangents: tuple[Array | SymbolicZero, Array | SymbolicZero],
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    whole = _is_whole()
    in_x = _linear_in_x if whole or _by_winograd(x, kernel, strides, padding) else _direct
    in_kernel = _linear_in_kernel if whole else _direct
    # It is linear in both. What is not differentiated costs nothing.
    changes = []
    if not isinstance(dx, SymbolicZero):
        changes.append(in_x(dx, kernel, strides, padding))
    if not isinstance(dkernel, SymbolicZero):
        changes.append(in_kernel(x, dkernel, strides, padding))
    return _convolve(x, kernel, strides, padding), functools.reduce(jnp.add, changes)


def _is_whole() -> bool:
    """Returns whether the compiler has no devices to divide the program among.

    It knows how to divide the gradients that JAX derives, by examples; those below it computes
    whole on each device.
    """
    return jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual


# On a CPU these two are transposes of the gradients below, so that JAX, which transposes them for
# reverse mode, arrives at those. They are jitted to be traced once for all layers of one shape.


@functools.partial(jax.jit, static_argnums=(2, 3))
def _linear_in_x(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    direct = functools.partial(_direct, strides=strides, padding=padding)
    y = jax.eval_shape(direct, x, kernel)

    def on_cpu(x: Array, kernel: Array) -> Array:
        if _by_winograd(x, kernel, strides, padding):
            gradient = functools.partial(winograd.gradient, kernel=kernel)
        else:
            gradient = functools.partial(_gradient_of_x, kernel, x.shape, strides, padding)
        return jax.linear_transpose(gradient, y)(_varying_as(kernel, x))[0]

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=direct)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _linear_in_kernel(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    direct = functools.partial(_direct, strides=strides, padding=padding)
    y = jax.eval_shape(direct, x, kernel)

    def on_cpu(x: Array, kernel: Array) -> Array:
        gradient = functools.partial(_gradient_of_kernel, x, kernel.shape, strides, padding)
        return jax.linear_transpose(gradient, y)(_varying_as(x, kernel))[0]

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=direct)


def _varying_as(other: Array, value: Array) -> Array:
    """Returns the value, which in `shard_map` differs between devices where another does, too."""
    wanted, given = (jax.typeof(a).manual_axis_type.varying for a in (other, value))
    return lax.pcast(value, tuple(wanted - given), to="varying") if wanted - given else value


def _gradient_of_x(
    kernel: Array, shape: Sequence[int], strides: Strides, padding: Padding, dy: Array
) -> Array:
    """Returns dx, eq. (1), of the given shape."""
    pads = []
    for axis, (stride, (before, _)) in enumerate(zip(strides, padding, strict=True)):
        spread = (dy.shape[1 + axis] - 1) * stride + 1
        first = kernel.shape[axis] - 1 - before
        pads.append((first, shape[1 + axis] + kernel.shape[axis] - 1 - spread - first))
    turned = jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2)
    return _direct(dy, turned, (1,) * len(pads), tuple(pads), lhs_dilation=strides)


def _gradient_of_kernel(
    x: Array, shape: Sequence[int], strides: Strides, padding: Padding, dy: Array
) -> Array:
    """Returns dk, eq. (1), of the given shape."""
    pads = []
    for axis, (stride, (before, _)) in enumerate(zip(strides, padding, strict=True)):
        spread = (dy.shape[1 + axis] - 1) * stride + 1
        pads.append((before, shape[axis] - 1 + spread - x.shape[1 + axis] - before))
    columns, weights = jnp.swapaxes(x, 0, -1), jnp.moveaxis(dy, 0, -2)
    dkernel = _direct(columns, weights, (1,) * len(pads), tuple(pads), rhs_dilation=strides)
    return jnp.moveaxis(dkernel, 0, -2)
