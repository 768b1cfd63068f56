"""UCI hand-written digits, 8 x 8: the main job, five minutes on two CPU cores."""

from ml_collections import ConfigDict

from experiments.config import default


def get_config() -> ConfigDict:
    config = default()
    config.name = "digits"
    config.update(
        {
            "model": {
                "channels": 32,
                "channel_multipliers": (1, 2),
                "num_res_blocks": 1,
                "attention_levels": (),
            },
            "schedule": {"name": "cosine"},
            "parameterization": "v",
            "timesteps": "stratified",
            "optimizer": {"learning_rate": 1.5e-3, "warmup_steps": 100, "decay": "cosine"},
            "ema_decay": 0.999,
            "train": {
                "batch_size": 32,
                "num_steps": 4800,
                "log_every": 200,
                "checkpoint_every": 400,
                "sample_every": 1600,
            },
            "sample": {"num": 1000, "batch_size": 100, "solver": "ddpm", "steps": 50},
            "evaluate": {"neighbours": 5},
        }
    )
    return config
