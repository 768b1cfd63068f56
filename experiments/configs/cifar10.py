"""CIFAR-10 with the settings of Ho et al. 2020, appendix B: 35.7 M parameters, 800k steps.

Pictures on the way are drawn by DDIM in 50 steps; the paper's own sampler is
`python -m experiments.sample --workdir=runs/cifar10 --solver=ddpm --variance=large --steps=1000`.
"""

from ml_collections import ConfigDict

from experiments.config import default


def get_config() -> ConfigDict:
    config = default()
    config.name = "cifar10"
    config.update(
        {
            "data": {"name": "cifar10", "flip": True},
            "model": {"dropout": 0.1},  # the other defaults are that model's
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 5000, "clip_norm": 1.0},
            "ema_decay": 0.9999,
            "train": {
                "batch_size": 128,
                "num_steps": 800_000,
                "checkpoint_every": 5000,
                "sample_every": 20_000,
            },
        }
    )
    return config
