"""Training: state, train step, averages of parameters, sharding and checkpoints."""

from jaxdiff.training import ema, sharding
from jaxdiff.training.train_step import TrainState, init_state, make_train_step

__all__ = ["TrainState", "ema", "init_state", "make_train_step", "sharding"]
