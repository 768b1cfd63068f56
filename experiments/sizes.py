"""Networks to measure with, which diffusers' UNet2DModel has with as many parameters.

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


class _Network(NamedTuple):
    side: int
    colours: int
    channels: int
    multipliers: tuple[int, ...]
    attention: int  # the level that has it
    parameters: int
    on_cpu: int  # the size of batches
    to_train: int = 512  # on accelerators
    to_sample: int = 256
    # What a CPU of two cores is fastest as.
    devices_to_train: int = 1
    devices_to_sample: int = 1


_NETWORKS = {
    "digits": _Network(8, 1, 32, (1, 2), 1, 1_001_729, 64, 512, 256, 2, 2),
    "mnist": _Network(32, 1, 64, (1, 2, 2), 1, 6_469_889, 32, devices_to_sample=2),
    "cifar10": _Network(32, 3, 128, (1, 2, 2, 2), 1, 35_746_307, 8),
    # Of "google/ddpm-celebahq-256".
    "celebahq": _Network(256, 3, 128, (1, 1, 2, 2, 4, 4), 4, 113_673_219, 1, 32, 16),
}
NAMES = tuple(_NETWORKS)
SMALL = NAMES[:3]


def cpu_devices(name: str, program: str) -> int:
    """Returns how many devices a CPU is to be for a program (of `programs.MAKE`) of a size."""
    network = _network(name)
    return network.devices_to_train if program == "train" else network.devices_to_sample


def _network(name: str) -> _Network:
    return build.choose("--size", name, _NETWORKS)


def make(name: str, *, dtype: str = "float32", batch_size: int | None = None) -> Size:
    """Returns a size by its name.

    Args:
      name: one of `NAMES`.
      dtype: of the network.
      batch_size: of training and sampling; if not given, as the backend likes it.

    Raises:
      ValueError: there is no such size.
    """
    network = _network(name)
    if batch_size:
        to_train = to_sample = batch_size
    elif jax.default_backend() == "cpu":
        to_train = to_sample = network.on_cpu
    else:
        to_train, to_sample = network.to_train, network.to_sample
    config = default()
    config.name = name
    config.update(
        {
            "model": {
                "channels": network.channels,
                "channel_multipliers": network.multipliers,
                "num_res_blocks": 2,
                "attention_levels": (network.attention,),
                "dtype": dtype,
                "flash_attention": dtype != "float32",
            },
            "optimizer": {"clip_norm": 0.0},
            "train": {"batch_size": to_train},
            "sample": {
                "batch_size": to_sample,
                "threshold": "static",  # diffusers' DDIMScheduler clips x0, too
            },
        }
    )
    shape = (network.side, network.side, network.colours)
    return Size(config, shape, network.parameters, _peer(network))


def _peer(network: _Network) -> dict[str, Any]:
    levels = range(len(network.multipliers))
    kinds = ["Attn" if level == network.attention else "" for level in levels]
    return {
        "sample_size": network.side,
        "in_channels": network.colours,
        "out_channels": network.colours,
        "block_out_channels": [network.channels * factor for factor in network.multipliers],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": 2,
        "norm_num_groups": min(32, network.channels // 4),
        "attention_head_dim": None,  # one head
    }
