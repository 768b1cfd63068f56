"""UCI hand-written digits with learned variances, and 397 digits held out for the bound.

python -m experiments.train --config=experiments/configs/digits_learned_variance.py
python -m experiments.evaluate --workdir=runs/digits_learned_variance --bound
"""

from ml_collections import ConfigDict

from experiments.configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.name = "digits_learned_variance"
    config.update(
        {
            "data": {"split": "train[:1400]"},
            "vlb_weight": 0.001,
            "train": {"sample_every": 0},
            "sample": {"solver_options": {"variance": "learned"}},
        }
    )
    return config
