"""The configuration of an experiment: every key with its type and default."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, config_dict


def _options(of_type: type, *names: str) -> dict[str, Any]:
    return {name: config_dict.placeholder(of_type) for name in names}


def default() -> ConfigDict:
    """Returns the defaults, locked: a misspelt key or a wrong type fails at once."""
    config = ConfigDict(
        {
            "name": "",
            "seed": 0,
            # A directory of a model whose parameters to start from: see experiments.pretrained.
            "init_from": config_dict.placeholder(str),
            # How many parts of the devices; -1 for what is left. It changes no result.
            "mesh": {
                "data": -1,
                "fsdp": 1,  # divides parameters, averages and the optimiser's state, too
            },
            "data": {
                "name": "digits",  # a prepared TFDS data set, "folder", "table" or "pbc"
                "split": "train",
                "data_dir": config_dict.placeholder(str),  # TFDS's own default if not given
                "path": config_dict.placeholder(str),  # of the folder of images, or the table
                "size": config_dict.placeholder(int),  # images of a folder are cut to this size
                "pad_to": config_dict.placeholder(int),
                "shrink": 1,  # images, by this factor, after padding
                "flip": False,
                "dequantize": False,
                "in_memory": True,  # decode once, keep as uint8
                "worker_count": 0,  # processes that decode, where not in memory
                "resident": False,  # the whole data set is held by every device; changes no result
                # Of tables of visits, see jaxdiff.data.tables.
                "schema": config_dict.placeholder(str),  # a JSON file; inferred if not given
                "patient": config_dict.placeholder(str),  # columns; found by name if not given
                "time": config_dict.placeholder(str),
                "transform": "quantile",
                "categories": "one_hot",
                "static": "channels",  # drawn, too; or conditions: vector
                "fill": "carry",
                "crop": 0.0,  # how often only a part of a record is trained on
                "held_out": 0.0,  # the share of patients that are not trained on
            },
            # Names are those of the tables in experiments.build; options that are not given are the
            # library's own.
            "schedule": {
                "name": "linear",
                "num_steps": 1000,  # of a discrete schedule
                "shift": 1.0,  # of a continuous one, by the factor of the resolution
                "zero_terminal_snr": False,  # of a discrete one
                **_options(
                    float,
                    *("beta_start", "beta_end", "beta_min", "beta_max", "sigma_min", "sigma_max"),
                    *("s", "rho", "start", "end", "tau", "mean", "scale"),
                ),
            },
            "parameterization": "eps",
            "sigma_data": 0.5,  # of edm, as parameterization and as weighting
            "loss_scales": (),  # adds the loss of predictions averaged over so many pixels a side
            "weighting": "unit",
            "weighting_options": _options(float, "gamma", "k", "bias"),
            "timesteps": "uniform",
            "timesteps_options": {
                **_options(float, "mean", "std", "uniform_probability"),
                **_options(int, "num_terms"),
            },
            "vlb_weight": config_dict.placeholder(float),  # learns the variance, too; 0.001
            "offset_noise": 0.0,
            "self_condition": False,
            "labels": {
                "num_classes": 0,  # the network is told the data's labels; 0 for not
                "dropout": 0.1,  # how often it is not (or of the vector), for guidance without
                "null": True,  # whether there is a label more, for none; others' models may lack it
            },
            "model": {
                "channels": 128,
                "channel_multipliers": (1, 2, 2, 2),
                "num_res_blocks": 2,
                "attention_levels": (1,),
                "num_heads": 1,
                "head_dim": config_dict.placeholder(int),  # instead of num_heads
                "num_groups": 32,
                "min_group_channels": 4,
                "norm_epsilon": 1e-6,
                "dropout": 0.0,
                "scale_shift": False,
                "resample_blocks": False,
                # As other libraries have it.
                "frequency_shift": 1.0,
                "cosine_first": False,
                "downsample_padding": 0,
                "mid_attention_norm": True,
                "vector_dim": config_dict.placeholder(int),  # of conditions; tables bring their own
                "dtype": "float32",
                "flash_attention": False,  # by cuDNN on NVIDIA GPUs; not with float32
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
            },
            "ema_decay": 0.9999,
            # Averages beside that one, see jaxdiff.training.ema and experiments.ema.
            "averages": {
                "half_lives": (),  # in updates
                "sigma_rels": (),  # relative widths of power functions, such as (0.05, 0.1)
                "snapshot_every": 0,  # how often these are kept, to make others of; 0 for never
            },
            # Progressive training: stage i trains for num_steps[i] steps on images shrunk by
            # shrink[i], on the same parameters. What else is named changes, too. The last stage is
            # what the model is for.
            "stages": {
                "num_steps": (),  # their sum is train.num_steps
                "shrink": (),
                "shift": (),  # of the schedule
                "batch_size": (),
                "learning_rate": (),
            },
            "train": {
                "batch_size": 128,  # over all devices
                "microbatches": 1,  # parts of a batch that are computed one after the other
                "num_steps": 1000,
                # Steps that run without the host, but for CPU, where a loop would be slow.
                "steps_per_dispatch": 1,
                "log_every": 100,
                "checkpoint_every": 1000,
                "keep": 3,
                # Batches with a loss or gradient that is not finite are skipped; so many in a row
                # end the run. 0 skips none.
                "max_skipped": 100,
                "sample_every": 0,  # pictures on the way; 0 for none
                "tensorboard": False,
            },
            "sample": {
                "num": 64,
                "batch_size": 64,
                "solver": "ddim",
                "solver_options": {
                    **_options(str, "variance", "kind", "average", "variant"),
                    **_options(int, "order", "corrector_steps"),
                    **_options(float, "eta", "snr", "rtol", "atol"),
                },
                "grid": "trailing",
                "grid_options": _options(float, "rho", "a", "b", "sigma_min", "sigma_max", "end"),
                "steps": 50,
                "churn": 0.0,  # EDM's S_churn
                "churn_options": _options(float, "s_min", "s_max"),  # of sigma/alpha
                "churn_noise": 1.0,  # EDM's S_noise
                "guidance": "none",
                "guidance_options": {
                    **_options(float, "scale", "rescale", "eta", "norm_threshold", "low", "high"),
                    "weak_step": config_dict.placeholder(int),  # of autoguidance: a checkpoint's
                },
                "threshold": "static",  # of the predicted clean data: static, dynamic or none
                "label": config_dict.placeholder(int),  # of all samples; in turn if not given
                "seed": 0,
            },
            "evaluate": {
                # Precision, recall, density and coverage among pixels, k-th neighbours; 0 for none.
                "neighbours": 0,
                # What a model is to predict in a table, for its utility: a column, and the value of
                # it to tell from the others if it has more than two.
                "target": config_dict.placeholder(str),
                "positive": config_dict.placeholder(str),
            },
        }
    )
    return config.lock()
