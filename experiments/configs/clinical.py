"""Clinical time series: visits of patients, real ones that come with the package or your own."""

from ml_collections import ConfigDict

from experiments.config import default


def get_config() -> ConfigDict:
    config = default()
    config.name = "clinical"
    config.update(
        {
            "data": {
                "name": "pbc",
                "transform": "normal_quantile",
                "crop": 0.6,
                "held_out": 0.5,
            },
            "model": {
                "channels": 96,
                "channel_multipliers": (1, 2),
                "num_res_blocks": 1,
                "attention_levels": (),
                # Of a record of few visits a group of few channels would leave no level.
                "num_groups": 4,
                "dropout": 0.4,
            },
            "schedule": {"name": "cosine"},
            "parameterization": "v",
            "timesteps": "stratified",
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100, "decay": "cosine"},
            "ema_decay": 0.999,
            "train": {
                "batch_size": 32,
                "num_steps": 2500,
                "log_every": 200,
                "checkpoint_every": 500,
            },
            "sample": {"num": 312, "batch_size": 104, "solver": "ddpm", "steps": 100},
            "evaluate": {"target": "status", "positive": "2"},
        }
    )
    return config
