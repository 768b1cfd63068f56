"""The configuration of an experiment: every key with its type and default."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def default() -> ConfigDict:
    """Returns the defaults, locked: a misspelt key or a wrong type fails at once."""
    config = ConfigDict(
        {
            "name": "",
            "seed": 0,
            "data": {
                "name": "digits",  # a prepared TFDS data set, or "folder"
                "split": "train",
                "data_dir": config_dict.placeholder(str),  # TFDS's own default if not given
                "path": config_dict.placeholder(str),  # of the folder of images
                "size": config_dict.placeholder(int),  # images of a folder are cut to this size
                "pad_to": config_dict.placeholder(int),
                "flip": False,
                "dequantize": False,
                "in_memory": True,  # decode once, keep as uint8
                "worker_count": 0,  # processes that decode, where not in memory
            },
            "schedule": {
                "name": "linear",
                "num_steps": 1000,
                "beta_start": config_dict.placeholder(float),  # the schedule's own if not given
                "beta_end": config_dict.placeholder(float),
            },
            "parameterization": "eps",  # x0, eps, v, score or flow
            "weighting": "unit",  # unit, snr or min_snr
            "min_snr_gamma": 5.0,
            "timesteps": "uniform",  # uniform or stratified
            "model": {
                "channels": 128,
                "channel_multipliers": (1, 2, 2, 2),
                "num_res_blocks": 2,
                "attention_levels": (1,),
                "num_heads": 1,
                "dropout": 0.0,
                "scale_shift": False,
                "dtype": "float32",
                "remat": False,
            },
            "optimizer": {
                "name": "adam",  # adam or adamw
                "learning_rate": 2e-4,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.0,  # of adamw
                "warmup_steps": 0,
                "decay": "constant",  # constant or cosine (to zero, at the last step)
                "clip_norm": 1.0,  # 0 clips nothing
                "accumulate": 1,  # batches per update
            },
            "ema_decay": 0.9999,
            "train": {
                "batch_size": 128,  # over all devices
                "num_steps": 1000,
                "log_every": 100,
                "checkpoint_every": 1000,
                "keep": 3,
                "sample_every": 0,  # pictures on the way; 0 for none
                "tensorboard": False,
            },
            "sample": {
                "num": 64,
                "batch_size": 64,
                "solver": "ddim",  # ddpm or ddim
                "variance": "small",  # of ddpm
                "eta": 0.0,  # of ddim
                "grid": "trailing",  # trailing, leading or linspace
                "steps": 50,
                "clip": True,
                "seed": 0,
            },
            "evaluate": {
                # Precision, recall, density and coverage among pixels, k-th neighbours; 0 for none.
                "neighbours": 0,
            },
        }
    )
    return config.lock()
