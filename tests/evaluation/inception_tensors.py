"""Random tensors for Inception-V3, under which activations keep their size from layer to layer."""

import numpy as np


def random_tensors(shapes, seed=0):
    """Makes tensors of names and shapes, as in PyTorch."""
    rng = np.random.default_rng(seed)

    def one(name, shape):
        if len(shape) > 1:
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        if name.endswith(("running_var", "bn.weight")):
            return rng.uniform(0.5, 1.5, shape)
        return 0.1 * rng.normal(size=shape)

    return {name: one(name, shape).astype(np.float32) for name, shape in shapes.items()}
