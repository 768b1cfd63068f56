"""A network that compiles at once, and small runs of it, for tests of what is around a network."""

import flax.linen as nn
import jax.numpy as jnp

from experiments.configs import digits


class Pointwise(nn.Module):
    """A network that sees a pixel at a time."""

    channels: int = 0  # of the output, if not those of x
    classes: int = 0  # if it is told labels

    @nn.compact
    def __call__(self, x, noise_level, cond=None, *, dropout_keys=None):
        level = jnp.reshape(noise_level, (-1, *[1] * (x.ndim - 1))) / 1000
        hidden = jnp.concatenate([x, jnp.broadcast_to(level, x.shape)], -1)
        hidden = nn.Dense(16)(hidden)
        if self.classes:
            hidden += nn.Embed(self.classes, 16)(cond)[:, None, None]
        return nn.Dense(self.channels or x.shape[-1])(nn.tanh(hidden))


def make_model(config, channels):
    """In place of `experiments.build.make_model`."""
    classes = config.labels.num_classes and config.labels.num_classes + config.labels.null
    return Pointwise(channels * (1 if config.vlb_weight is None else 2), classes)


def tiny(own, changes):
    """A configuration of digits that draws and scores nothing, with a file's own and a test's."""
    config = digits.get_config()
    nothing = {"train": {"sample_every": 0}, "sample": {"num": 0}, "evaluate": {"neighbours": 0}}
    for values in (nothing, own, changes):
        config.update(values)
    return config
