"""The parts of a UNet: embedding, dropout, normalisation, blocks, changes of resolution.

Everything takes `(B, *spatial, C)`, channels last, with any number of spatial axes; the number is
read off the argument. Parameters are float32; `dtype` is what the products are computed in, while
statistics and softmax stay float32.

A mask `(B, *spatial)` is bool, True where there is data, or None where there is data everywhere,
which costs nothing. What stands off the mask of a layer's argument never reaches the mask of its
result; what the result is off the mask, nobody may read.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.models._checks import check
from jaxdiff.models.convolution import convolve

Array = jax.Array

# Ho et al. 2020 draw every kernel so, but for those that end a residual branch, which start at 0.
KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ZERO_INIT = nn.initializers.zeros_init()


def sinusoidal_embedding(
    noise_level: Array, dim: int, frequency_shift: float = 1.0, cosine_first: bool = False
) -> Array:
    """Embeds noise levels as sines, then cosines, of geometrically spaced frequencies.

        emb[:, i] = sin(t f_i),  emb[:, dim/2 + i] = cos(t f_i),  f_i = 10000^(-i / (dim/2 - s))

    Args:
      noise_level: `(B,)`, int or float.
      dim: the length of the embedding, even and at least 4.
      frequency_shift: s, less than dim/2. With 1 the last frequency is 1/10000 exactly; the code of
        Dhariwal & Nichol 2021 has 0.
      cosine_first: whether the cosines come before the sines, as there.

    Returns:
      float32 `(B, dim)`.

    Raises:
      ValueError: `dim` is odd or less than 4, or `frequency_shift` not less than half of it.

    Reference:
      Vaswani et al. 2017, section 3.5, in the form of Ho et al. 2020's code.
    """
    if dim < 4 or dim % 2:
        raise ValueError(
            f"dim must be even and at least 4, got {dim}: half of it are sines, half cosines"
        )
    half = dim // 2
    if not frequency_shift < half:
        raise ValueError(
            f"frequency_shift must be less than {half}, half of dim, got {frequency_shift}: 1 and "
            "0 are in use"
        )
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / (half - frequency_shift))
    angles = noise_level.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts[::-1] if cosine_first else parts, axis=-1)


@jax.custom_jvp
def silu(x: Array) -> Array:
    """Returns x / (1 + exp(-x)), in x's type (Elfwing et al. 2018; computed in float32).

    A quotient, not x sigmoid(x): XLA on a CPU keeps the result of what it holds for expensive, but
    would compute that product anew in whatever reads it, convolutions' transposed copies included.
    """
    wide = x.astype(jnp.float32)
    return (wide / (1 + jnp.exp(-wide))).astype(x.dtype)


@silu.defjvp
def _silu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y, share = silu(x), jax.nn.sigmoid(x)
    if x.dtype == jnp.float32:
        return y, dx * (share + y * (1 - share))
    # The same of x alone: accelerators, which take less than float32, have y to read less.
    return y, dx * (share * (1 + x * (1 - share)))


def written_once(x: Array) -> Array:
    """Returns x, which programs for NVIDIA GPUs write once, for all that read it.

    XLA would write some concatenations there for each that reads them, and what follows, too.
    """
    return jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=lambda x: x)


def per_example_dropout(x: Array, rate: float, keys: Array | None, salt: int) -> Array:
    """Drops entries of each example with that example's own key.

    The mask of example i depends on `keys[i]` and `salt` alone: on neither the batch it travels
    in, nor sharding, nor microbatching.

    Args:
      x: `(B, ...)`.
      rate: the probability of dropping an entry, in [0, 1); what stays is divided by `1 - rate`.
      keys: typed keys `(B,)`, or None, which returns `x` as it is.
      salt: which layer is asking, an int in [0, 2**32); static, distinct for each layer.

    Returns:
      Array like `x`.

    Reference:
      Srivastava et al. 2014, in the inverted form.
    """
    if keys is None or rate == 0.0:
        return x
    salt = np.uint32(salt)

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1.0 - rate), jnp.zeros_like(x))


def upsample_nearest(x: Array) -> Array:
    """Doubles every spatial axis of `(B, *spatial, C)` by repeating entries.

    A broadcast and a reshape: no gather, and its gradient is a sum.
    """
    batch, *spatial, channels = x.shape
    split = [n for size in spatial for n in (size, 1)]
    twice = [n for size in spatial for n in (size, 2)]
    x = x.reshape(batch, *split, channels)
    x = jnp.broadcast_to(x, (batch, *twice, channels))
    return x.reshape(batch, *(2 * size for size in spatial), channels)


def downsample_mean(x: Array) -> Array:
    """Halves every spatial axis of `(B, *spatial, C)`, all of them even, by means of neighbours."""
    batch, *spatial, channels = x.shape
    pairs = x.reshape(batch, *(n for size in spatial for n in (size // 2, 2)), channels)
    return jnp.mean(pairs, axis=tuple(range(2, pairs.ndim - 1, 2)))


def masks_of_levels(mask: Array | None, levels: int) -> list[Array | None]:
    """Returns the mask of each level: a position has data if any of those that it covers has.

    Args:
      mask: `(B, *spatial)`, bool or int, of level 0; None gives None for all.
      levels: how many levels there are; each halves every spatial axis.
    """
    if mask is None:
        return [None] * levels
    masks = [mask.astype(bool)]
    for _ in range(levels - 1):
        batch, *spatial = masks[-1].shape
        pairs = masks[-1].reshape(batch, *(n for size in spatial for n in (size // 2, 2)))
        masks.append(jnp.any(pairs, axis=tuple(range(2, pairs.ndim, 2))))
    return masks


def keep(x: Array, mask: Array | None) -> Array:
    """Returns x `(B, *spatial, C)` with 0 off the mask: what a convolution sees beyond an edge."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def group_count(channels: int, num_groups: int, min_group_channels: int) -> int:
    """Returns the largest number of groups, at most `num_groups`, that fits `channels`.

    It divides `channels` and, where possible, leaves each group `min_group_channels`: a group of
    one channel would subtract whatever was added to the channel, and with it the noise level.
    """
    most = max(1, min(num_groups, channels // min_group_channels))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) with float32 statistics.

    One pass gathers every channel's mean and mean square, and the groups' are means of those; XLA
    makes faster programs of it, on a CPU, than of means over groups. Before it each group is
    shifted by its mean at the first position with data, so that an offset does not cancel the
    digits. Off the mask nothing is counted, and the result is 0.

    Attributes:
      num_groups: the number of groups, at most; see `group_count`.
      min_group_channels: how many channels a group has, at least.
      epsilon: added to the variance.
      dtype: of the result.
    """

    num_groups: int = 32
    min_group_channels: int = 4
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Normalises `(B, *spatial, C)` over the positions of a mask `(B, *spatial)`."""
        batch, *spatial, channels = x.shape
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        groups = group_count(channels, self.num_groups, self.min_group_channels)

        def to_channels(per_group: Array) -> Array:
            spread = jnp.broadcast_to(per_group, (batch, groups, channels // groups))
            return spread.reshape(batch, 1, channels)

        def mean_of_group(per_channel: Array) -> Array:
            return jnp.mean(per_channel.reshape(batch, groups, -1), axis=-1, keepdims=True)

        def mean_of_positions(x: Array) -> Array:
            mean = jnp.mean(x, axis=1)
            return mean if mask is None else mean / share

        x = x.astype(jnp.float32).reshape(batch, math.prod(spatial), channels)
        first = x[:, 0]
        if mask is not None:
            expected, got = f"None or of shape {(batch, *spatial)}", f"shape {mask.shape}"
            check(mask.shape == (batch, *spatial), "mask", expected, got, "it has no channels")
            mask = mask.reshape(x.shape[:2])
            share = jnp.mean(mask, axis=1, keepdims=True, dtype=x.dtype)
            share = jnp.where(share > 0, share, 1)  # no data: the sums are 0, too
            first = jnp.take_along_axis(x, jnp.argmax(mask, axis=1)[:, None, None], axis=1)[:, 0]
        # The result does not depend on the shift, so no gradient goes through it.
        x = keep(x - jax.lax.stop_gradient(to_channels(mean_of_group(first))), mask)
        mean = mean_of_group(mean_of_positions(x))
        square = mean_of_group(mean_of_positions(jnp.square(x)))
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        factor = to_channels(jax.lax.rsqrt(variance + self.epsilon)) * scale[None, None]
        y = keep(x * factor + (bias[None, None] - to_channels(mean) * factor), mask)
        return y.astype(self.dtype).reshape(batch, *spatial, channels)


def convolution(
    features: int, axes: int, *, stride: int = 1, padding_before: int = 0, **kwargs: Any
) -> nn.Conv:
    """Returns a convolution of width 3 over `axes` spatial axes.

    With `stride` 1 it keeps the size; with 2 it halves it, padding `(padding_before, 1)`: 0 before
    as Ho et al. 2020 do, or 1 as Dhariwal & Nichol 2021 do.
    """
    kwargs.setdefault("kernel_init", KERNEL_INIT)
    padding = (1, 1) if stride == 1 else (padding_before, 1)
    return nn.Conv(
        features,
        (3,) * axes,
        strides=(stride,) * axes,
        padding=[padding] * axes,
        conv_general_dilated=convolve,
        **kwargs,
    )


def dense(features: int, **kwargs: Any) -> nn.Dense:
    """Returns a product of the last axis with a kernel, plus a bias."""
    kwargs.setdefault("kernel_init", KERNEL_INIT)
    return nn.Dense(features, dot_general=_product, **kwargs)


def _product(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """Multiplies as `lax.dot_general` does, x `(..., C)` with `(C, features)`.

    As matrices: XLA on a CPU copies arrays of more axes before it multiplies them for the gradient.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, + embedding, norm, SiLU, dropout, conv, and a way around them.

    Attributes:
      features: channels out.
      dropout: the rate of dropout before the last convolution.
      scale_shift: whether the embedding scales and shifts the second normalisation (Dhariwal &
        Nichol 2021, section 3) instead of being added before it (Ho et al. 2020).
      norm: makes a normalisation, `(x, mask) -> array like x`.
      dtype: of the computation.
      resample: changes the resolution, `(B, *spatial, C) -> (B, *spatial', C)`, before the first
        convolution and on the way around (the up- and downsampling blocks of Dhariwal & Nichol
        2021); None leaves it.
    """

    features: int
    dropout: float = 0.0
    scale_shift: bool = False
    norm: Callable[..., nn.Module] = GroupNorm
    dtype: Any = jnp.float32
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        embedding: Array,
        dropout_keys: Array | None = None,
        mask: Array | None = None,
        mask_after: Array | None = None,
    ) -> Array:
        """Maps x `(B, *spatial, C)` and an activated embedding `(B, E)` to `features` channels.

        `dropout_keys` holds one typed key per example, `(B,)`; None means no dropout. `mask` is
        that of x, `(B, *spatial)`, and `mask_after`, if the block changes the resolution, that of
        the result.
        """
        axes = x.ndim - 2
        h = silu(self.norm(name="norm_0")(x, mask))
        if self.resample is not None:
            h, x, mask = self.resample(h), self.resample(keep(x, mask)), mask_after
            h = keep(h, mask)
        h = convolution(self.features, axes, dtype=self.dtype, name="conv_0")(h)

        told = dense(
            self.features * (2 if self.scale_shift else 1), dtype=self.dtype, name="embedding"
        )(embedding)
        told = jnp.expand_dims(told, tuple(range(1, 1 + axes)))
        if self.scale_shift:
            scale, shift = jnp.split(told, 2, axis=-1)
            h = keep(self.norm(name="norm_1")(h, mask) * (1 + scale) + shift, mask)
        else:
            h = self.norm(name="norm_1")(h + told, mask)

        salt = zlib.crc32("/".join(self.path).encode())
        h = per_example_dropout(silu(h), self.dropout, dropout_keys, salt)
        h = convolution(
            self.features, axes, kernel_init=ZERO_INIT, dtype=self.dtype, name="conv_1"
        )(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, dtype=self.dtype, name="shortcut")(x)
        return x + h


def attend(
    query: Array, key: Array, value: Array, mask: Array | None = None, *, flash: bool = False
) -> Array:
    """Returns softmax(query key^T / sqrt(H)) value, of each head.

    Args:
      query: `(B, T, N, H)`, N heads of H channels.
      key: `(B, S, N, H)`.
      value: `(B, S, N, H)`.
      mask: bool `(B, S)`, True where there is something to attend to; None means everywhere.
      flash: whether cuDNN computes it in programs for NVIDIA GPUs, where the weights `(T, S)` are
        then never in memory (Dao et al. 2022), if cuDNN is installed and takes these arguments:
        float16 or bfloat16, H a multiple of 8 and at most 128, on Hopper and later 256. All else,
        and every other device, is computed by XLA. What cuDNN computes has a gradient, but no
        derivative forwards, nor a second one.

    Returns:
      `(B, T, N, H)`.

    Raises:
      ValueError: `flash` with another type than float16 or bfloat16.
    """
    narrow = None if mask is None else mask[:, None, None, :]
    by_xla = functools.partial(jax.nn.dot_product_attention, mask=narrow)
    if not flash:
        return by_xla(query, key, value)
    check(
        query.dtype in (jnp.bfloat16, jnp.float16),
        "dtype",
        "bfloat16 or float16 for flash attention",
        query.dtype,
        "choose one of them, or leave flash attention off",
    )

    def by_cudnn(query: Array, key: Array, value: Array) -> Array:
        shape = (key.shape[0], 1, query.shape[1], key.shape[1])
        whole = None if narrow is None else jnp.broadcast_to(narrow, shape)
        return jax.nn.dot_product_attention(query, key, value, mask=whole, implementation="cudnn")

    try:
        jax.eval_shape(by_cudnn, query, key, value)
    except (RuntimeError, NotImplementedError):  # no cuDNN; or it does not take such heads
        return by_xla(query, key, value)
    return jax.lax.platform_dependent(query, key, value, cuda=by_cudnn, default=by_xla)


class AttentionBlock(nn.Module):
    """Attention from all positions to one another, or to tokens, around which the input is added.

    Self-attention where it is given x alone, cross-attention where it is given tokens too.

    Attributes:
      num_heads: into how many heads the channels are divided.
      norm: makes a normalisation, `(x, mask) -> array like x`; None means none.
      dtype: of the computation; the softmax is float32.
      flash: whether cuDNN computes it on NVIDIA GPUs; see `attend`.

    Reference:
      Vaswani et al. 2017, section 3.2; to tokens, Rombach et al. 2022, section 3.3.
    """

    num_heads: int = 1
    norm: Callable[..., nn.Module] | None = GroupNorm
    dtype: Any = jnp.float32
    flash: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Array | None = None,
        mask: Array | None = None,
        x_mask: Array | None = None,
    ) -> Array:
        """Maps `(B, *spatial, C)` to the same shape.

        Args:
          x: `(B, *spatial, C)`.
          tokens: `(B, L, D)`, what is attended to, L at least 1; None means x itself. Their order
            is not seen.
          mask: `(B, L)`, bool or int, 1 where a token counts; None means that all count. What
            stands in the others, NaN included, is never seen. Where none counts, x stays as it is.
          x_mask: that of x, `(B, *spatial)`; x does not attend to itself off it.

        Raises:
          ValueError: `num_heads` does not divide C, or the shapes of tokens and mask do not fit.
        """
        batch, *spatial, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(
                f"num_heads must divide the channels, got {self.num_heads} heads for {channels} "
                "channels: choose a divisor, or change channels"
            )
        _check_tokens(tokens, mask, batch)
        h = x if self.norm is None else self.norm(name="norm")(x, x_mask)
        h = h.reshape(batch, math.prod(spatial), channels)
        source = h if tokens is None else tokens
        if tokens is None and x_mask is not None:
            mask = x_mask.reshape(h.shape[:2])
        if mask is not None:
            mask = mask.astype(bool)
            source = jnp.where(mask[:, :, None], source, 0)  # a weight of 0 would let NaN through

        def heads(name: str, y: Array) -> Array:
            y = dense(channels, dtype=self.dtype, name=name)(y)
            return y.reshape(*y.shape[:2], self.num_heads, channels // self.num_heads)

        h = attend(
            heads("query", h), heads("key", source), heads("value", source), mask, flash=self.flash
        )
        h = dense(channels, kernel_init=ZERO_INIT, dtype=self.dtype, name="out")(
            h.reshape(batch, -1, channels)
        )
        if mask is not None:
            # With no token left, the softmax is over nothing; nor may the biases speak then.
            h = jnp.where(jnp.any(mask, axis=1)[:, None, None], h, 0)
        return x + h.reshape(x.shape)


def _check_tokens(tokens: Array | None, mask: Array | None, batch: int) -> None:
    """Raises ValueError for tokens other than `(B, L, D)` or a mask other than `(B, L)`."""
    if tokens is None:
        check(mask is None, "mask", "None where there are no tokens", "a mask", "leave it out")
        return
    check(
        tokens.ndim == 3 and tokens.shape[0] == batch and tokens.shape[1] > 0,
        "tokens",
        f"of shape ({batch}, L, D) with L at least 1",
        f"shape {tokens.shape}",
        "to attend to nothing, pass one token of zeros and mask it out",
    )
    check(
        mask is None or mask.shape == tokens.shape[:2],
        "mask",
        f"None or of shape {tokens.shape[:2]}",
        f"shape {getattr(mask, 'shape', None)}",
        "give it one entry per token",
    )
