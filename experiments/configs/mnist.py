"""MNIST, padded to 32 x 32. Prepare it with TFDS first, in the array_record format."""

from ml_collections import ConfigDict

from experiments.config import default


def get_config() -> ConfigDict:
    config = default()
    config.name = "mnist"
    config.update(
        {
            "data": {"name": "mnist", "pad_to": 32},
            "model": {
                "channels": 64,
                "channel_multipliers": (1, 2, 2),
                "attention_levels": (1,),
                "dropout": 0.1,
            },
            "optimizer": {"warmup_steps": 1000},
            "ema_decay": 0.999,
            "train": {"num_steps": 50_000, "checkpoint_every": 2500, "sample_every": 5000},
        }
    )
    return config
