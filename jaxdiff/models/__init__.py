"""Flax Linen networks that know no diffusion: `(x, noise level, cond) -> array like x`.

Parameters are plain pytrees and `apply` is a pure function; nothing here knows of schedules,
losses or samplers, and nothing there knows of these networks.
"""

from jaxdiff.models.conditioning import Condition, read_condition, sequence_positions
from jaxdiff.models.layers import (
    AttentionBlock,
    GroupNorm,
    ResidualBlock,
    per_example_dropout,
    sinusoidal_embedding,
    upsample_nearest,
)
from jaxdiff.models.unet import UNet

__all__ = [
    "AttentionBlock",
    "Condition",
    "GroupNorm",
    "ResidualBlock",
    "UNet",
    "per_example_dropout",
    "read_condition",
    "sequence_positions",
    "sinusoidal_embedding",
    "upsample_nearest",
]
