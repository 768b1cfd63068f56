"""Images of 256 x 256 pixels, of a folder of your own: 282 M parameters, for many devices.

    python -m experiments.plan --config=experiments/configs/images_256.py --topology=v5e:16x16
    python -m experiments.train --config=experiments/configs/images_256.py --config.data.path=DIR

The network is that of Dhariwal & Nichol 2021 at this size, three quarters as wide. The cosine
schedule is shifted from 64 pixels, where it is good, to 256, and the network predicts v (Hoogeboom
et al. 2023, "simple diffusion"). Parameters are divided over 8 devices (mesh.fsdp).
"""

from ml_collections import ConfigDict

from experiments.config import default


def get_config() -> ConfigDict:
    config = default()
    config.name = "images_256"
    config.update(
        {
            "mesh": {"fsdp": 8},
            "data": {
                "name": "folder",
                "size": 256,
                "flip": True,
                "in_memory": False,
                "worker_count": 8,
            },
            "model": {
                "channels": 192,
                "channel_multipliers": (1, 1, 2, 2, 4, 4),
                "num_res_blocks": 2,
                "attention_levels": (3, 4, 5),  # 32, 16 and 8 pixels
                "num_heads": 4,
                "scale_shift": True,
                "dropout": 0.1,
                "dtype": "bfloat16",
                "remat": True,
            },
            "schedule": {"name": "vp_cosine", "shift": 4.0},
            "parameterization": "v",
            "timesteps": "low_discrepancy",
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "weight_decay": 0.01,
                "warmup_steps": 10_000,
                "clip_norm": 1.0,
            },
            "ema_decay": 0.9999,
            "train": {
                "batch_size": 256,
                "num_steps": 1_000_000,
                "log_every": 100,
                "checkpoint_every": 5000,
                "sample_every": 20_000,
            },
            "sample": {"num": 256, "batch_size": 256, "solver": "ddim", "steps": 50},
        }
    )
    return config
