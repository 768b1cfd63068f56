"""Three networks to measure with, which diffusers' UNet2DModel has with as many parameters.

Beside the network all is as in Ho et al. 2020: linear schedule, eps, Adam with a moving average;
and nothing that diffusers' own pipeline and training script would not do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments import build
from experiments.config import default


class Size(NamedTuple):
    """A network and what to do with it.

    Attributes:
      config: the configuration.
      shape: of one example.
      parameters: how many the network has; None where that is not settled here.
      peer: the arguments of the same UNet2DModel; None where there is none.
    """

    config: ConfigDict
    shape: tuple[int, ...]
    parameters: int | None = None
    peer: dict[str, Any] | None = None


# Side, colours, channels, multipliers, batch on CPU, parameters.
_SIZES = {
    "digits": (8, 1, 32, (1, 2), 64, 1_001_729),
    "mnist": (32, 1, 64, (1, 2, 2), 32, 6_469_889),
    "cifar10": (32, 3, 128, (1, 2, 2, 2), 8, 35_746_307),
}
NAMES = tuple(_SIZES)
ATTENTION = 1  # the level that has it
TRAIN_BATCH, SAMPLE_BATCH = 512, 256  # on accelerators, whatever the size


def make(name: str, *, dtype: str = "float32", batch_size: int | None = None) -> Size:
    """Returns a size by its name.

    Args:
      name: one of `NAMES`.
      dtype: of the network.
      batch_size: of training and sampling; if not given, as the backend likes it.

    Raises:
      ValueError: there is no such size.
    """
    build.choose("--size", name, _SIZES)
    side, colours, channels, multipliers, on_cpu, parameters = _SIZES[name]
    cpu = jax.default_backend() == "cpu"
    config = default()
    config.name = name
    config.update(
        {
            "model": {
                "channels": channels,
                "channel_multipliers": multipliers,
                "num_res_blocks": 2,
                "attention_levels": (ATTENTION,),
                "dtype": dtype,
            },
            "optimizer": {"clip_norm": 0.0},
            "train": {"batch_size": batch_size or (on_cpu if cpu else TRAIN_BATCH)},
            "sample": {
                "batch_size": batch_size or (on_cpu if cpu else SAMPLE_BATCH),
                "threshold": "static",  # diffusers' DDIMScheduler clips x0, too
            },
        }
    )
    return Size(
        config, (side, side, colours), parameters, _peer(side, colours, channels, multipliers)
    )


def _peer(side: int, colours: int, channels: int, multipliers: tuple[int, ...]) -> dict[str, Any]:
    kinds = ["Attn" if level == ATTENTION else "" for level in range(len(multipliers))]
    return {
        "sample_size": side,
        "in_channels": colours,
        "out_channels": colours,
        "block_out_channels": [channels * factor for factor in multipliers],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": 2,
        "norm_num_groups": min(32, channels // 4),
        "attention_head_dim": None,  # one head
    }
