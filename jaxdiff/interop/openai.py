"""Checkpoints of OpenAI's improved-diffusion and guided-diffusion, read into our `UNet`.

Their network is a list of input blocks, a middle block and a list of output blocks:

    input_blocks.0.0       the first convolution
    input_blocks.N.0       a residual block, or what halves the resolution
    input_blocks.N.1       attention after it
    middle_block.0 .1 .2   a residual block, attention, a residual block
    output_blocks.N.0 .1   a residual block, attention after it
    output_blocks.N.1/.2   behind the last block of a level, what doubles the resolution
    out.0 out.2            the last normalisation and convolution

A file has names and shapes only. Widths, levels, blocks, attention, classes, scale and shift,
learned variance and blocks that change the resolution are read off them; the rest is told by the
arguments of `load_openai`, which have the names of the flags of their scripts.

Reference:
  Nichol & Dhariwal 2021; Dhariwal & Nichol 2021, and the code published with them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from jaxdiff import predictions, schedules
from jaxdiff.interop._parameters import Slot, SlotOf, from_tensors, shapes_of
from jaxdiff.interop.pretrained import Drawing, Pretrained
from jaxdiff.interop.tensors import read_tensors
from jaxdiff.models import UNet

_GROUPS = 32  # of all their normalisations


class _Layout(NamedTuple):
    """What names and shapes say of a network.

    Attributes:
      widths: the channels of each level.
      blocks: residual blocks of a level on the way down.
      attention: the levels with attention.
      by_blocks: whether blocks change the resolution.
      names: the prefix of each of our modules among the tensors.
    """

    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    by_blocks: bool
    names: Mapping[str, str]


def load_openai(
    path: str | os.PathLike,
    *,
    image_size: int,
    noise_schedule: Literal["linear", "cosine"] = "linear",
    diffusion_steps: int = 1000,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool = False,
    rescale_timesteps: bool = False,
    predict_xstart: bool = False,
    dropout: float = 0.0,
) -> Pretrained:
    """Reads a checkpoint of improved-diffusion or guided-diffusion.

    Args:
      path: the `.pt` file, or the same tensors as safetensors.
      image_size: height and width of the images.
      noise_schedule: "linear", whose betas are 0.0001 to 0.02 at 1000 steps and in proportion at
        others, or "cosine".
      diffusion_steps: T.
      num_heads: heads of attention (their default is 4); give it or `num_head_channels`.
      num_head_channels: channels of a head; 64 in the models of guided-diffusion.
      use_new_attention_order: whether queries, keys and values are split before the heads and not
        after. (No published model.)
      rescale_timesteps: whether the network was told 1000 t / T, as improved-diffusion's is unless
        told otherwise.
      predict_xstart: whether it predicts clean data and not noise.
      dropout: the rate of dropout, for training further.

    Returns:
      The checkpoint. `drawing` is ancestral sampling with all steps and clipping; fewer steps are
      spread as by `--timestep_respacing=N`. Their DDIM finds the noise anew after clipping, as
      `solvers.ddim` with `guidance.clip_x0` does.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an argument is out of range, or the tensors are not those of such a network; says
        which, with the expected and the found shape.
    """
    if (num_heads is None) == (num_head_channels is None):
        raise ValueError(
            "one of num_heads and num_head_channels must be given, got "
            f"{num_heads} and {num_head_channels}: the file does not say it"
        )
    if noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule must be 'linear' or 'cosine', got {noise_schedule!r}")
    if type(diffusion_steps) is not int or diffusion_steps < 1:
        raise ValueError(f"diffusion_steps must be a positive integer, got {diffusion_steps!r}")
    scale = 1000 / diffusion_steps
    where, tensors = str(path), read_tensors(path)
    layout = _read_layout(where, tensors)
    model, channels = _read_unet(where, tensors, layout)
    model = model.clone(
        num_heads=1 if num_heads is None else num_heads,
        head_dim=num_head_channels,
        noise_level_scale=scale if rescale_timesteps else 1.0,
        dropout=dropout,
    )
    factor = 2 ** (len(layout.widths) - 1)
    if type(image_size) is not int or image_size < 1 or image_size % factor:
        raise ValueError(
            f"image_size must be a multiple of {factor}, as the network has {len(layout.widths)} "
            f"levels, got {image_size!r}"
        )
    shapes = shapes_of(model, channels)  # heads that divide no width are refused here
    split = _split_attention(where, tensors, model, use_new_attention_order)
    params = from_tensors(where, split, shapes, _slots(layout))
    if noise_schedule == "cosine":
        schedule = schedules.cosine(diffusion_steps)
    else:
        schedule = schedules.linear(diffusion_steps, 0.0001 * scale, 0.02 * scale)
    learned = model.out_channels == 2 * channels
    return Pretrained(
        model=model,
        params=params,
        schedule=schedule,
        parameterization=predictions.x0 if predict_xstart else predictions.eps,
        image_shape=(image_size, image_size, channels),
        learned_variance=learned,
        drawing=Drawing(
            method="ddpm",
            num_steps=diffusion_steps,
            spacing="linspace",
            noise_before_clipping=False,
            # Their fixed variance is the large one unless sigma_small was set.
            variance="learned" if learned else "large",
        ),
    )


def _read_layout(where: str, tensors: Mapping[str, np.ndarray]) -> _Layout:
    """Reads the levels off the names and shapes of the input blocks."""
    pattern = re.compile(r"input_blocks\.(\d{1,4})\.")
    numbers = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    if not numbers or "middle_block.1.qkv.weight" not in tensors:
        raise ValueError(
            f"{where} must have the tensors of a UNet of improved- or guided-diffusion, such as "
            f"'input_blocks.0.0.weight', got {', '.join(list(tensors)[:3])}, ..."
        )
    count = max(numbers)
    if gap := set(range(count + 1)) - numbers:
        raise ValueError(f"{where}: the tensors of 'input_blocks.{min(gap)}' are missing")
    names = {"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
    names |= {"embedding_0": "time_embed.0", "embedding_1": "time_embed.2"}
    names |= {"label_embedding": "label_emb", "mid_attention": "middle_block.1"}
    names |= {"mid_block_0": "middle_block.0", "mid_block_1": "middle_block.2"}

    # What halves the resolution is a convolution "op", or a block; it comes behind a whole level.
    levels: list[list[str]] = [[]]
    by_blocks = not any(".op." in name for name in tensors)
    blocks = _blocks_of_a_level(tensors, count, by_blocks)
    for number in range(1, count + 1):
        prefix = f"input_blocks.{number}.0"
        if len(levels[-1]) == blocks:
            names[f"down_{len(levels) - 1}_downsample"] = prefix + ("" if by_blocks else ".op")
            levels.append([])
        else:
            names[f"down_{len(levels) - 1}_block_{len(levels[-1])}"] = prefix
            levels[-1].append(prefix)
    attention, widths = [], []
    for level, prefixes in enumerate(levels):
        if len(prefixes) != blocks or not prefixes:
            raise ValueError(
                f"{where}: level {level} must have {blocks} residual blocks as the others do, got "
                f"{len(prefixes)}: the input blocks are not those of such a UNet"
            )
        for i, prefix in enumerate(prefixes):
            if prefix[:-1] + "1.qkv.weight" in tensors:
                names[f"down_{level}_attention_{i}"] = prefix[:-1] + "1"
                attention.append(level)
        widths.append(_shape(where, tensors, f"{prefixes[0]}.out_layers.3.weight", 4)[0])
    number = 0
    for level in reversed(range(len(levels))):
        for i in range(blocks + 1):
            prefix = f"output_blocks.{number}"
            names[f"up_{level}_block_{i}"] = f"{prefix}.0"
            names[f"up_{level}_attention_{i}"] = f"{prefix}.1"
            number += 1
        if level > 0:
            after = f"{prefix}.{2 if level in attention else 1}"
            names[f"up_{level}_upsample"] = after + ("" if by_blocks else ".conv")

    width = _shape(where, tensors, "time_embed.0.weight", 2)[1]
    fits = all(w % width == 0 and w % _GROUPS == 0 for w in widths) and widths[0] == width
    if not fits:
        raise ValueError(
            f"{where}: the widths of the levels must be multiples of the {width} channels of the "
            f"time embedding, the first of them the same, and of {_GROUPS} groups, got {widths}: "
            "networks with other channel_mult, such as that for 512 pixels, are not supported"
        )
    return _Layout(tuple(widths), blocks, tuple(sorted(set(attention))), by_blocks, names)


def _read_unet(where: str, tensors: Mapping[str, np.ndarray], layout: _Layout) -> tuple[UNet, int]:
    """Reads the network, but for what no shape says, and the channels of its images."""
    channels = _shape(where, tensors, "input_blocks.0.0.weight", 4)[1]
    out_channels = _shape(where, tensors, "out.2.weight", 4)[0]
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{where}: tensor 'out.2.weight' must have {channels} outputs as the images have "
            f"channels, or {2 * channels} with a learned variance, got {out_channels}"
        )
    classes = None
    if "label_emb.weight" in tensors:
        classes = _shape(where, tensors, "label_emb.weight", 2)[0]
    told = _shape(where, tensors, "middle_block.0.emb_layers.1.weight", 2)[0]
    width = layout.widths[0]
    model = UNet(
        out_channels=out_channels,
        channels=width,
        channel_multipliers=tuple(w // width for w in layout.widths),
        num_res_blocks=layout.blocks,
        attention_levels=layout.attention,
        num_groups=_GROUPS,
        min_group_channels=1,
        scale_shift=told == 2 * layout.widths[-1],
        num_classes=classes,
        frequency_shift=0.0,
        cosine_first=True,
        norm_epsilon=1e-5,
        downsample_padding=1,
        resample_blocks=layout.by_blocks,
    )
    return model, channels


def _blocks_of_a_level(tensors: Mapping[str, np.ndarray], count: int, by_blocks: bool) -> int:
    """Returns how many residual blocks a level has on the way down."""
    if not by_blocks:
        halving = [n for n in range(1, count + 1) if f"input_blocks.{n}.0.op.weight" in tensors]
        return halving[0] - 1
    # On the way up it has one more, numbered from 0, behind the last of which the level ends.
    ends = [
        number
        for number in range(count + 1)
        for part in ("1", "2")
        if f"output_blocks.{number}.{part}.in_layers.0.weight" in tensors
    ]
    return ends[0] if ends else count


def _split_attention(
    where: str, tensors: Mapping[str, np.ndarray], model: UNet, new_order: bool
) -> dict[str, np.ndarray]:
    """Returns the tensors with queries, keys and values apart, which stand in one there.

    They are (3, heads, width of a head) in the new order, and (heads, 3, width of a head) in that
    of all published models.
    """
    split = {}
    for name, tensor in tensors.items():
        if ".qkv." not in name:
            split[name] = tensor
            continue
        prefix, _, leaf = name.partition(".qkv.")
        width = _shape(where, tensors, f"{prefix}.norm.weight", 1)[0]
        expected = (3 * width, width, 1) if leaf == "weight" else (3 * width,)
        if tensor.shape != expected:
            raise ValueError(
                f"{where}: tensor {name!r} must be of shape {expected}, got {tensor.shape}"
            )
        heads = width // model.head_dim if model.head_dim else model.num_heads
        if not heads or width % heads:
            raise ValueError(f"{where}: tensor {name!r}: {width} channels make no {heads} heads")
        tensor = tensor.reshape(tensor.shape[:2])
        if new_order:
            parts = tensor.reshape(3, width, *tensor.shape[1:])
        else:
            parts = tensor.reshape(heads, 3, width // heads, *tensor.shape[1:])
            parts = parts.swapaxes(0, 1).reshape(3, width, *tensor.shape[1:])
        for part, kind in zip(parts, ("query", "key", "value"), strict=True):
            split[f"{prefix}.{kind}.{leaf}"] = part
    return split


def _slots(layout: _Layout) -> SlotOf:
    """Returns where the parameters of the network stand."""
    inner = {
        **{"norm_0": "in_layers.0", "conv_0": "in_layers.2", "embedding": "emb_layers.1"},
        **{"norm_1": "out_layers.0", "conv_1": "out_layers.3", "shortcut": "skip_connection"},
        **{"norm": "norm", "query": "query", "key": "key", "value": "value", "out": "proj_out"},
    }
    ones = {"shortcut": 2, "out": 1}

    def slot_of(keys: tuple[str, ...]) -> Slot:
        module, *between, leaf = keys
        parts = [layout.names[module], *(inner[part] for part in between)]
        parts.append("bias" if leaf == "bias" else "weight")
        return Slot(".".join(parts), sum(ones.get(part, 0) for part in between))

    return slot_of


def _shape(where: str, tensors: Mapping[str, np.ndarray], name: str, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor that must be there and have so many axes."""
    if name not in tensors:
        raise ValueError(f"{where}: tensor {name!r} is missing")
    if tensors[name].ndim != axes:
        raise ValueError(
            f"{where}: tensor {name!r} must have {axes} axes, got shape {tensors[name].shape}"
        )
    return tensors[name].shape
