"""The multi-scale loss: errors at several resolutions (Hoogeboom, Heek & Salimans 2023).

The mean square of an error over a large image is mostly that of fine details. Simple diffusion
(section 3.2) therefore also counts errors at lower resolutions. With D_s[.] the mean over blocks
that leaves s x s of the d x d pixels,

    L_s = 1/s² |D_s[eps] - D_s[eps_hat]|²,    L = sum over s in {32, 64, ..., d} of L_s / s    (1)

With f = d / s, the side of a block, and multiplied by d, so that the loss at full resolution is the
plain one,

    loss = mean |e|² + sum over f > 1 of f * mean |D_f[e]|²                                    (2)

An error that is constant over blocks counts 1 + sum f times, one that has mean zero in every block
counts once. White noise, which n axes average by f^n, counts 1 + sum f^(1-n) times.

D_f is linear: the mean over blocks of the best prediction is the best prediction of the mean over
blocks, and what minimises the plain loss minimises eq. (2). For the same reason e may be the error
of any parameterization: at a given x and t it is a number times that of eps, and this number
squared is a weight like in the plain loss (`jaxdiff.losses.weightings`).

With a mask, D_f is the mean over those coordinates of a block that count, and a block counts as
often as it has such coordinates: with m_b the number of them in block b,

    mean |D_f[e]|² = sum_b m_b |D_f[e]_b|² / sum_b m_b                                         (3)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.base import Array
from jaxdiff.losses._masks import masked_mean


def multiscale_mean_square(error: Array, scales: Sequence[int], mask: Array | None = None) -> Array:
    """Returns the weighted sum of an error's mean squares at several resolutions, eq. (2).

    Args:
      error: `(B, *spatial, C)`.
      scales: the sides f of the blocks, such as `(1, 2, 4)`, which must divide every spatial size.
        Full resolution, 1, always counts, whether it is named or not.
      mask: 0 or 1, broadcasts to `error`; None for all ones.

    Returns:
      `(B,)`; 0 for an example whose mask is empty.

    Raises:
      ValueError: `scales` are not whole numbers from 1 on in ascending order; there are no spatial
        axes, or a size is not a multiple of a scale; the mask does not broadcast to `error`.
    """
    check_scales(scales)
    total = masked_mean(jnp.square(error), mask)
    for factor in scales:
        if factor > 1:
            total += factor * _mean_square_of_blocks(error, factor, mask)
    return total


def check_scales(scales: Sequence[int]) -> None:
    """Raises ValueError unless these are whole numbers from 1 on in ascending order."""
    if list(scales) != sorted({int(factor) for factor in scales if factor >= 1}):
        raise ValueError(
            f"scales must be whole numbers from 1 on in ascending order, such as (1, 2, 4), got "
            f"{tuple(scales)}"
        )


def _mean_square_of_blocks(error: Array, factor: int, mask: Array | None) -> Array:
    sizes = error.shape[1:-1]
    if not sizes or any(size % factor for size in sizes):
        raise ValueError(
            f"scales are sides of blocks that must divide the data's spatial sizes {sizes}, got "
            f"{factor}: leave it out" + (", or pad the data" if sizes else "")
        )
    if mask is None:
        return masked_mean(jnp.square(_block_sum(error, factor) / factor ** len(sizes)))
    mask = jnp.broadcast_to(mask, error.shape).astype(error.dtype)
    counts = _block_sum(mask, factor)
    # A masked value may be anything, also infinite or NaN.
    sums = _block_sum(jnp.where(mask > 0, error * mask, 0), factor)
    return masked_mean(jnp.square(sums / jnp.where(counts > 0, counts, 1)), counts)


def _block_sum(x: Array, factor: int) -> Array:
    """Sums over blocks of `factor` entries along every spatial axis."""
    rows, *sizes, channels = x.shape
    blocks = [part for size in sizes for part in (size // factor, factor)]
    axes = tuple(range(2, 2 + 2 * len(sizes), 2))
    return jnp.sum(x.reshape(rows, *blocks, channels), axis=axes)
