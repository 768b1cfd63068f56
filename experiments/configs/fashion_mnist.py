"""Fashion-MNIST, padded to 32 x 32 and mirrored at random."""

from ml_collections import ConfigDict

from experiments.configs import mnist


def get_config() -> ConfigDict:
    config = mnist.get_config()
    config.name = "fashion_mnist"
    config.update({"data": {"name": "fashion_mnist", "flip": True}})
    return config
