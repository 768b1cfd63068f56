"""The config of diffusers' `UNet2DModel` as a `UNet`, and the names of its tensors.

Each field of the config is honoured, or refused by its name and value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxdiff.interop._files import check_field
from jaxdiff.interop._parameters import Slot, SlotOf
from jaxdiff.models import UNet

# The fields of UNet2DModel and what they are where a config leaves them out.
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D"] + 3 * ["AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": 3 * ["AttnUpBlock2D"] + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # for time embeddings that are learned, which are refused
}
_MOST, _MOST_LEVELS, _MOST_BLOCKS = 2**20, 16, 256  # far above any network
# What our UNet has one of, and the values that mean it.
_ONLY = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "flip_sin_to_cos": (False, True),
}
# Each block by whether it has attention, and whether a block changes the resolution; None: as
# downsample_type or upsample_type say.
_DOWN = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
}
_UP = {
    "UpBlock2D": (False, False),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, True),
}


def read_config(where: str, config: Mapping[str, Any]) -> tuple[UNet, tuple[int, int] | None, int]:
    """Reads a config.

    Args:
      where: the file, for messages.
      config: what stands in it.

    Returns:
      The network, the height and width of its images or None, and the channels that it takes.

    Raises:
      ValueError: a field is unknown, or has a value that our network cannot follow; names both.
    """
    fields = _read_fields(where, config)
    widths, groups = fields["block_out_channels"], fields["norm_num_groups"]
    fits = isinstance(widths, (list, tuple)) and 0 < len(widths) <= _MOST_LEVELS
    fits = fits and all(map(_is_count, widths))
    fits = fits and all(width % widths[0] == width % groups == 0 for width in widths)
    fits = fits and widths[0] % 2 == 0 and widths[0] >= 4
    expected = f"multiples of the first, which is even, and of the {groups} groups"
    check_field(where, "block_out_channels", widths, fits, expected)
    attention, by_blocks = _read_blocks(where, fields, len(widths))
    head = fields["attention_head_dim"]
    attended = [width for i, width in enumerate(widths) if i in attention] + [widths[-1]]
    fits = head is None or all(width % head == 0 for width in attended)
    check_field(where, "attention_head_dim", head, fits, f"a divisor of the widths {attended}")
    dim = fields["time_embedding_dim"]
    check_field(where, "time_embedding_dim", dim, dim in (None, 4 * widths[0]), f"{4 * widths[0]}")
    own, shifted = fields["attn_norm_num_groups"], fields["resnet_time_scale_shift"] != "default"
    check_field(where, "attn_norm_num_groups", own, own in (None, groups), f"null or {groups}")

    model = UNet(
        out_channels=fields["out_channels"],
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=fields["layers_per_block"],
        attention_levels=attention,
        head_dim=head,
        num_groups=groups,
        min_group_channels=1,
        dropout=float(fields["dropout"]),
        scale_shift=shifted,
        num_classes=fields["num_class_embeds"],
        frequency_shift=float(fields["freq_shift"]),
        cosine_first=bool(fields["flip_sin_to_cos"]),
        norm_epsilon=float(fields["norm_eps"]),
        downsample_padding=int(fields["downsample_padding"]),
        resample_blocks=by_blocks,
        mid_attention_norm=own is not None or not shifted,
    )
    return model, _read_size(where, fields["sample_size"], len(widths)), fields["in_channels"]


def slots(model: UNet, old: bool = False) -> SlotOf:
    """Returns where the parameters of a network stand among the tensors of `UNet2DModel`.

    Args:
      model: the network.
      old: whether the parts of attention have the names they had before diffusers 0.15.
    """
    last = len(model.channel_multipliers) - 1
    inner = {
        **{"norm_0": "norm1", "conv_0": "conv1", "embedding": "time_emb_proj"},
        **{"norm_1": "norm2", "conv_1": "conv2", "shortcut": "conv_shortcut"},
        **{"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v"},
        "out": "to_out.0",
    }
    if old:
        inner |= {"query": "query", "key": "key", "value": "value", "out": "proj_attn"}
    outer = {
        **{"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"},
        **{"embedding_0": "time_embedding.linear_1", "embedding_1": "time_embedding.linear_2"},
        **{"label_embedding": "class_embedding", "mid_attention": "mid_block.attentions.0"},
        **{"mid_block_0": "mid_block.resnets.0", "mid_block_1": "mid_block.resnets.1"},
    }

    def outer_name(module: str) -> str:
        if module in outer:
            return outer[module]
        way, level, part, number = re.fullmatch(r"(\w+?)_(\d+)_([a-z]+)_?(\d*)", module).groups()
        block = f"{way}_blocks.{level if way == 'down' else last - int(level)}"
        if part in ("downsample", "upsample"):
            return f"{block}.{part}rs.0" + ("" if model.resample_blocks else ".conv")
        return f"{block}.{'resnets' if part == 'block' else 'attentions'}.{number}"

    def slot_of(keys: tuple[str, ...]) -> Slot:
        module, *between, leaf = keys
        parts = [outer_name(module), *(inner[part] for part in between)]
        parts.append("bias" if leaf == "bias" else "weight")
        return Slot(".".join(parts), 2 if between == ["shortcut"] else 0)

    return slot_of


def _read_fields(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all fields, with their defaults, after the checks of each by itself."""
    kind = config.get("_class_name", "UNet2DModel")
    check_field(where, "_class_name", kind, kind == "UNet2DModel", "'UNet2DModel'")
    for name, value in config.items():
        known = name in _DEFAULTS or name.startswith("_")
        check_field(where, name, value, known, f"left out; known are {', '.join(_DEFAULTS)}")
    fields = {**_DEFAULTS, **config}
    for name, values in _ONLY.items():
        check_field(
            where, name, fields[name], fields[name] in values, " or ".join(map(repr, values))
        )
    for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        check_field(where, name, fields[name], _is_count(fields[name]), "a positive integer")
    blocks = fields["layers_per_block"]
    check_field(where, "layers_per_block", blocks, blocks <= _MOST_BLOCKS, f"<= {_MOST_BLOCKS}")
    for name in ("num_class_embeds", "attention_head_dim"):
        fits = fields[name] is None or _is_count(fields[name])
        check_field(where, name, fields[name], fits, "null or a positive integer")
    for name, least, most in (("dropout", 0, 1), ("norm_eps", 1e-12, 1), ("freq_shift", 0, 2)):
        fits = type(fields[name]) in (int, float) and least <= fields[name] < most
        check_field(where, name, fields[name], fits, f"a number in [{least}, {most})")
    return fields


def _read_blocks(
    where: str, fields: Mapping[str, Any], levels: int
) -> tuple[tuple[int, ...], bool]:
    """Reads the types of blocks: the levels with attention, and whether blocks resample."""
    read = {}
    for name, known, default in (
        ("down_block_types", _DOWN, fields["downsample_type"] == "resnet"),
        ("up_block_types", _UP, fields["upsample_type"] == "resnet"),
    ):
        types = fields[name]
        fits = isinstance(types, (list, tuple)) and len(types) == levels
        check_field(
            where, name, types, fits, f"{levels} blocks, as block_out_channels has {levels}"
        )
        for kind in types:
            fits = isinstance(kind, str) and kind.removeprefix("UNetRes") in known
            check_field(where, name, kind, fits, f"of blocks among {', '.join(known)}")
        kinds = [known[kind.removeprefix("UNetRes")] for kind in types]
        read[name] = [(attends, default if blocks is None else blocks) for attends, blocks in kinds]
    down, up = read["down_block_types"], read["up_block_types"][::-1]
    attention = tuple(level for level, (attends, _) in enumerate(down) if attends)
    fits = attention == tuple(level for level, (attends, _) in enumerate(up) if attends)
    expected = "attention at the levels at which down_block_types has it, in reverse order"
    check_field(where, "up_block_types", fields["up_block_types"], fits, expected)
    ways = {blocks for _, blocks in down[:-1] + up[1:]}
    if len(ways) > 1:
        raise ValueError(
            f"{where}: all changes of resolution must be by convolutions, or all by blocks, got "
            f"down_block_types {fields['down_block_types']} with downsample_type "
            f"{fields['downsample_type']!r}, up_block_types {fields['up_block_types']} with "
            f"upsample_type {fields['upsample_type']!r}"
        )
    return attention, ways == {True}


def _read_size(where: str, size: Any, levels: int) -> tuple[int, int] | None:
    """Reads the height and width of images, of one number, two or none."""
    if size is None:
        return None
    pair = [size, size] if type(size) is int else size
    fits = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_count, pair))
    fits = fits and all(side % 2 ** (levels - 1) == 0 for side in pair)
    check_field(where, "sample_size", size, fits, f"one or two multiples of {2 ** (levels - 1)}")
    return tuple(pair)


def _is_count(value: Any) -> bool:
    # At most so many: a hostile one would keep the machine busy for ever.
    return type(value) is int and 1 <= value <= _MOST
