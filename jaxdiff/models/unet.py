"""The UNet of Ho et al. 2020 for 1, 2 or 3 spatial axes, and of Dhariwal & Nichol 2021 by option.

It knows no diffusion: it maps an array and a noise level to an array. Its layers are, one to one
and with readable names, those of diffusers' `UNet2DModel`; with the fields of the paper's CIFAR-10
model it has that model's 35,746,307 parameters. What it may be told beside the noise level is in
`jaxdiff.models.conditioning`; each condition adds its own parameters and leaves the others be.

With a mask, a padded example gives what it gives alone: convolutions see zeros beyond the data,
means are over the data, and nothing attends to padding.

Example (with `jax.eval_shape`, which only traces; `model.init(...)` makes the parameters):
  >>> import jax
  >>> model = UNet(out_channels=3, dropout=0.1)
  >>> x = jax.numpy.zeros((4, 32, 32, 3))
  >>> params = jax.eval_shape(model.init, jax.random.key(0), x, 0)
  >>> sum(leaf.size for leaf in jax.tree.leaves(params))
  35746307
  >>> jax.eval_shape(model.apply, params, x, jax.numpy.arange(4)).shape
  (4, 32, 32, 3)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.models import layers
from jaxdiff.models._checks import check, describe
from jaxdiff.models.conditioning import Condition, read_condition
from jaxdiff.models.layers import AttentionBlock, GroupNorm, ResidualBlock, convolution, silu

Array = jax.Array


class UNet(nn.Module):
    """A UNet, `(x, noise level, cond) -> array like x`.

    Layers are named after the level they work at, 0 being full resolution, on the way down and on
    the way up: `down_0_block_1`, `down_1_attention_0`, `down_0_downsample`, `mid_block_0`,
    `up_1_block_2`, `up_1_upsample`. No parameter depends on the size of the input. The output is 0
    at initialisation.

    The channels of x need not be those of the output: for self-conditioning x carries the previous
    prediction behind its own channels, and with a learned variance the output has twice as many.

    Attributes:
      out_channels: channels of the output.
      channels: channels at full resolution, before the multipliers; even, at least 4.
      channel_multipliers: for each level its channels, in units of `channels`.
      num_res_blocks: residual blocks of a level on the way down; one more on the way up.
      attention_levels: at which levels attention follows each residual block.
      num_heads: heads of attention.
      head_dim: if set, the channels of each head; it then decides the number of heads.
      num_groups: groups of each group normalisation, at most: their number also divides the
        channels and leaves `min_group_channels` to each group.
      min_group_channels: channels of a group, at least. With 1, small models are blind: a group of
        one channel removes the embedding added to it.
      dropout: rate of dropout in the residual blocks; used where `dropout_keys` are given.
      scale_shift: whether the embedding scales and shifts activations (Dhariwal & Nichol 2021)
        instead of being added to them.
      num_classes: how many labels there are, or None for no labels. For classifier-free guidance
        count "no label" as one; by convention it is the last.
      vector_dim: the length of the vector, of any numbers, that an example comes with, or None.
        For guidance keep some value, such as zeros, to mean "no vector".
      sequence_dim: the length of a token of the sequence that an example comes with, or None. Each
        attention is then followed by one to the tokens, in the middle also where
        `attention_levels` is empty. Their order is not seen: add positions to tokens if it counts.
        A sequence with every token masked out is "no sequence" and adds exactly nothing.
      image_channels: the channels of an image, of the spatial size of x, that an example comes
        with, or None: the small picture, already enlarged, for super-resolution, or the grey one
        for colouring.
      noise_level_scale: what a noise level is multiplied by before it is embedded; 1000 suits
        levels in [0, 1].
      frequency_shift: see `sinusoidal_embedding`; so is `cosine_first`.
      cosine_first: whether the embedding's cosines come before its sines.
      norm_epsilon: what the group normalisations add to the variance.
      downsample_padding: 0 or 1, how many zeros a downsampling convolution sees before the data; it
        sees one behind.
      resample_blocks: whether residual blocks change the resolution (Dhariwal & Nichol 2021)
        instead of single convolutions: `down_0_downsample` and `up_1_upsample` are then blocks.
      mid_attention_norm: whether the attention in the middle is normalised, as all others are.
      flash_attention: whether cuDNN computes attention on NVIDIA GPUs, in bfloat16 or float16;
        `attend` says when, and what derivatives that leaves. Elsewhere it changes nothing.
      dtype: of the computation; parameters, statistics and the output are float32.
      remat: whether to compute the blocks' activations anew on the way back, to save memory; it
        changes nothing else. (XLA's compiler for CPUs undoes it.)

    Reference:
      Ho et al. 2020, appendix B.
    """

    out_channels: int
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    head_dim: int | None = None
    num_groups: int = 32
    min_group_channels: int = 4
    dropout: float = 0.0
    scale_shift: bool = False
    num_classes: int | None = None
    vector_dim: int | None = None
    sequence_dim: int | None = None
    image_channels: int | None = None
    noise_level_scale: float = 1.0
    frequency_shift: float = 1.0
    cosine_first: bool = False
    norm_epsilon: float = 1e-6
    downsample_padding: int = 0
    resample_blocks: bool = False
    mid_attention_norm: bool = True
    flash_attention: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        noise_level: Array | float,
        cond: Array | Mapping[str, Array] | None = None,
        *,
        dropout_keys: Array | None = None,
    ) -> Array:
        """Applies the network.

        Args:
          x: float `(B, *spatial, C)` with 1, 2 or 3 spatial axes, each divisible by
            `2 ** (levels - 1)`.
          noise_level: int or float, scalar or `(B,)`.
          cond: what the fields declare, and no more: a dict with "label" int `(B,)`, "vector"
            `(B, vector_dim)`, "sequence" `(B, L, sequence_dim)`, if need be "sequence_mask"
            `(B, L)`, bool or int, 1 where a token counts, and "image"
            `(B, *spatial, image_channels)`. A bare array means labels. A label outside of
            `[0, num_classes)` gives NaN; masked tokens may hold anything, NaN too. Any network may
            also be told "mask" `(B, *spatial)`, bool or int, 1 where there is data: what x and
            the image hold elsewhere, NaN too, is never seen, and the output is 0 there.
          dropout_keys: typed keys `(B,)`, one per example; None means no dropout.

        Returns:
          float32 `(B, *spatial, out_channels)`.

        Raises:
          ValueError: a field or an argument does not fit the above.
        """
        self._check_fields()
        x, noise_level = jnp.asarray(x), jnp.asarray(noise_level)
        self._check_arguments(x, noise_level, dropout_keys)
        told = read_condition(
            cond,
            x,
            num_classes=self.num_classes,
            vector_dim=self.vector_dim,
            sequence_dim=self.sequence_dim,
            image_channels=self.image_channels,
        )

        embedding = silu(self._embed(jnp.broadcast_to(noise_level, x.shape[:1]), told))
        norm = functools.partial(
            GroupNorm,
            self.num_groups,
            self.min_group_channels,
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
        )
        conv = functools.partial(convolution, axes=x.ndim - 2, dtype=self.dtype)

        def block(h: Array, level: int, name: str) -> Array:
            cls = nn.remat(ResidualBlock) if self.remat else ResidualBlock
            features = self.channels * self.channel_multipliers[level]
            module = cls(features, self.dropout, self.scale_shift, norm, self.dtype, name=name)
            return module(h, embedding, dropout_keys, masks[level])

        def resample(h: Array, level: int, to: int, change: Callable, name: str) -> Array:
            cls = nn.remat(ResidualBlock) if self.remat else ResidualBlock
            fields = (h.shape[-1], self.dropout, self.scale_shift, norm, self.dtype, change)
            return cls(*fields, name=name)(h, embedding, dropout_keys, masks[level], masks[to])

        def attention(h: Array, level: int, name: str) -> Array:
            cls = nn.remat(AttentionBlock) if self.remat else AttentionBlock
            heads = h.shape[-1] // self.head_dim if self.head_dim else self.num_heads
            own = None if name == "mid_attention" and not self.mid_attention_norm else norm
            make = functools.partial(cls, heads, dtype=self.dtype, flash=self.flash_attention)
            h = make(own, name=name)(h, x_mask=masks[level])
            if told.sequence is not None:
                name = name.replace("attention", "cross_attention")
                h = make(norm, name=name)(h, told.sequence, told.sequence_mask, masks[level])
            return h

        last = len(self.channel_multipliers) - 1
        masks = layers.masks_of_levels(told.mask, last + 1)
        h = x.astype(self.dtype)
        if told.image is not None:
            h = jnp.concatenate([h, told.image.astype(self.dtype)], axis=-1)
        h = conv(self.channels, name="conv_in")(layers.keep(h, masks[0]))
        skips = [h]
        for level in range(last + 1):
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_block_{i}")
                if level in self.attention_levels:
                    h = attention(h, level, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < last:
                name = f"down_{level}_downsample"
                if self.resample_blocks:
                    h = resample(h, level, level + 1, layers.downsample_mean, name)
                else:
                    down = conv(
                        h.shape[-1], stride=2, padding_before=self.downsample_padding, name=name
                    )
                    h = down(layers.keep(h, masks[level]))
                skips.append(h)

        h = block(h, last, "mid_block_0")
        h = attention(h, last, "mid_attention")
        h = block(h, last, "mid_block_1")

        for level in reversed(range(last + 1)):
            for i in range(self.num_res_blocks + 1):
                h = layers.written_once(jnp.concatenate([h, skips.pop()], axis=-1))
                h = block(h, level, f"up_{level}_block_{i}")
                if level in self.attention_levels:
                    h = attention(h, level, f"up_{level}_attention_{i}")
            if level > 0:
                name = f"up_{level}_upsample"
                if self.resample_blocks:
                    h = resample(h, level, level - 1, layers.upsample_nearest, name)
                else:
                    h = layers.keep(layers.upsample_nearest(h), masks[level - 1])
                    h = conv(h.shape[-1], name=name)(h)

        h = silu(norm(name="norm_out")(h, masks[0]))
        h = conv(self.out_channels, kernel_init=layers.ZERO_INIT, name="conv_out")(h)
        return layers.keep(h.astype(jnp.float32), masks[0])

    def _embed(self, noise_level: Array, told: Condition) -> Array:
        """Embeds noise levels `(B,)`, and labels and vectors if any, as `(B, 4 * channels)`."""
        dense = functools.partial(
            nn.Dense, 4 * self.channels, kernel_init=layers.KERNEL_INIT, dtype=self.dtype
        )
        levels = noise_level.astype(jnp.float32) * self.noise_level_scale
        embedding = layers.sinusoidal_embedding(
            levels, self.channels, self.frequency_shift, self.cosine_first
        )
        embedding = dense(name="embedding_0")(embedding)
        embedding = dense(name="embedding_1")(silu(embedding))
        if told.label is not None:
            table = nn.Embed(
                self.num_classes,
                4 * self.channels,
                embedding_init=nn.initializers.normal(1.0),
                dtype=self.dtype,
                name="label_embedding",
            )
            label = told.label.astype(jnp.int32)
            known = (label >= 0) & (label < self.num_classes)  # -1 would be read as the last
            embedding = embedding + jnp.where(known[:, None], table(label), jnp.nan)
        if told.vector is not None:
            vector = dense(name="vector_embedding_0")(told.vector)
            embedding = embedding + dense(name="vector_embedding_1")(silu(vector))
        return embedding

    def _check_fields(self) -> None:
        """Raises ValueError for fields that make no network."""
        for name in ("out_channels", "num_res_blocks", "num_heads", "num_groups"):
            check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name), "raise it")
        check(
            self.min_group_channels >= 1,
            "min_group_channels",
            "at least 1",
            self.min_group_channels,
            "4 keeps small models from losing the noise level",
        )
        check(
            self.channels >= 4 and self.channels % 2 == 0,
            "channels",
            "even and at least 4",
            self.channels,
            "half of the embedding are sines, half cosines",
        )
        check(
            len(self.channel_multipliers) > 0 and min(self.channel_multipliers) >= 1,
            "channel_multipliers",
            "one positive int per level",
            self.channel_multipliers,
            "(1, 2, 2, 2) makes four levels",
        )
        levels = len(self.channel_multipliers)
        check(
            all(0 <= level < levels for level in self.attention_levels),
            "attention_levels",
            f"indices of the {levels} levels, in [0, {levels})",
            self.attention_levels,
            "they count resolutions, 0 being full resolution, and are not sizes in pixels",
        )
        check(
            self.downsample_padding in (0, 1),
            "downsample_padding",
            "0 or 1",
            self.downsample_padding,
            "1 centres the kernel",
        )
        check(
            self.norm_epsilon > 0,
            "norm_epsilon",
            "positive",
            self.norm_epsilon,
            "1e-6 and 1e-5 are in use",
        )
        check(0.0 <= self.dropout < 1.0, "dropout", "in [0, 1)", self.dropout, "0 means no dropout")
        for name, what in (
            ("num_classes", "labels"),
            ("vector_dim", "vectors"),
            ("sequence_dim", "sequences"),
            ("image_channels", "images"),
        ):
            value = getattr(self, name)
            cure = f"None means a network without {what}"
            check(value is None or value >= 1, name, "None or at least 1", value, cure)
        attended = {*self.attention_levels, levels - 1}  # the middle always attends
        for level in sorted(attended):
            name = "num_heads" if self.head_dim is None else "head_dim"
            width, value = self.channels * self.channel_multipliers[level], getattr(self, name)
            check(
                value >= 1 and width % value == 0,
                name,
                f"a divisor of the {width} channels of level {level}",
                value,
                "choose a divisor, or change channels",
            )

    def _check_arguments(self, x: Array, noise_level: Array, dropout_keys: Array | None) -> None:
        """Raises ValueError for arguments that do not fit; costs nothing at run time."""
        check(
            3 <= x.ndim <= 5,
            "x",
            "(B, *spatial, C) with 1, 2 or 3 spatial axes",
            f"shape {x.shape}",
            "add the batch and channel axes if they are missing",
        )
        check(
            jnp.issubdtype(x.dtype, jnp.floating),
            "x",
            "floating",
            x.dtype,
            "scale the data to floats in [-1, 1]",
        )
        factor = 2 ** (len(self.channel_multipliers) - 1)
        check(
            all(size > 0 and size % factor == 0 for size in x.shape[1:-1]),
            "x",
            f"spatial sizes divisible by {factor}, as {len(self.channel_multipliers)} levels halve "
            f"them {len(self.channel_multipliers) - 1} times",
            f"shape {x.shape}",
            "pad x, and say where in cond's mask, or use fewer channel_multipliers",
        )
        batch = x.shape[:1]
        check(
            noise_level.shape in ((), batch) and _is_real(noise_level),
            "noise_level",
            f"int or float of shape () or {batch}",
            describe(noise_level),
            "one level for all examples, or one for each",
        )
        if dropout_keys is not None:
            check(
                jax.dtypes.issubdtype(dropout_keys.dtype, jax.dtypes.prng_key)
                and dropout_keys.shape == batch,
                "dropout_keys",
                f"typed keys of shape {batch}",
                describe(dropout_keys),
                "make them with jax.random.split(jax.random.key(seed), B) or rng.per_example",
            )


def _is_real(x: Array) -> bool:
    """Whether `x` is int or float."""
    return jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)
