"""UCI hand-written digits of chosen classes, by classifier-free guidance; on two CPU cores."""

from ml_collections import ConfigDict

from experiments.configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.name = "digits_conditional"
    config.update(
        {
            "labels": {"num_classes": 10, "dropout": 0.1},
            "train": {"num_steps": 6400, "sample_every": 0},
            "sample": {"guidance": "classifier_free", "guidance_options": {"scale": 1.5}},
        }
    )
    return config
