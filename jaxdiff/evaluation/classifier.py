"""Features of a small classifier that is trained on the data set itself.

Where no Inception weights are at hand, or where photographs' features make no sense, as for digits,
the last hidden layer of a classifier of the data's own labels tells samples from data far better
than pixels do. Distances of such features compare models of one data set with one classifier; they
are classifier-feature distances, not FIDs, and mean nothing beside other classifiers'.

    fitted = classifier.train_classifier(images, labels, seed=0)
    scores = classifier.extract(fitted, samples)     # features (N, 64), probabilities (N, K)

The same images, labels, options and seed give the same classifier, on CPUs of one kind bit by bit,
with however many devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff.evaluation import _images
from jaxdiff.evaluation.batches import map_batches

NUM_FEATURES = 64
_MIN_SIZE = 8
_MAX_SIZE = 64  # at which the network begins
_WIDTHS = (32, 64, 128)  # channels at full, half, and any lower resolution
_LEARNING_RATE = 2e-3


class Classifier(NamedTuple):
    """A trained classifier.

    Attributes:
      params: of the network.
      accuracy: the share of held-out images whose class it tells, in [0, 1].
      accuracy_error: the standard error of that share.
      held_out: the indices of the images that it was not trained on, `(M,)`.
      shape: of an image, `(H, W, C)`.
    """

    params: Any
    accuracy: float
    accuracy_error: float
    held_out: np.ndarray
    shape: tuple[int, int, int]


class Outputs(NamedTuple):
    """What a classifier says of images.

    Attributes:
      features: the last hidden layer, `(N, 64)`, of no unit, a few apart.
      probabilities: of the classes `0 .. K-1`, `(N, K)`; for `inception_score`, which is then the
        classifier's and not the published one.
    """

    features: np.ndarray
    probabilities: np.ndarray


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    seed: int = 0,
    steps: int = 600,
    batch_size: int = 64,
    held_out: float = 0.2,
) -> Classifier:
    """Trains a classifier, on one device: convolutions, group normalisation, two dense layers.

    Args:
      images: `(N, H, W, C)`, uint8 in 0 .. 255 or floating in [-1, 1]; H and W at least 8. The
        device holds all of them. Above 64 they are averaged down first, by 2, 4, ...: of finer
        detail the features tell nothing.
      labels: their classes, integers from 0, `(N,)`.
      seed: of the parameters, the split and the order of the batches.
      steps: of AdamW, on a cosine schedule.
      batch_size: images a step.
      held_out: the share of images that only measure the accuracy, in (0, 1).

    Returns:
      The classifier. Look at its accuracy: features of one that learned nothing tell nothing.

    Raises:
      ValueError: there are no labels or only one class, or an argument is of a wrong shape or
        range.
    """
    images, labels = _check(images, labels)
    if min(steps, batch_size) < 1 or not 0 < held_out < 1:
        raise ValueError(
            "expected steps and batch_size of at least 1 and held_out in (0, 1), got "
            f"{steps}, {batch_size} and {held_out}"
        )
    num_held_out = round(held_out * len(images))
    if not 1 <= num_held_out < len(images):
        raise ValueError(f"held_out = {held_out} of {len(images)} images leaves a part empty")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    aside, train = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    epochs = -(-steps * batch_size // len(train))
    batches = np.concatenate([rng.permutation(train) for _ in range(epochs)])
    batches = batches[: steps * batch_size].reshape(steps, batch_size)

    model = _Network(int(labels.max()) + 1)
    data = jax.device_put((jax.random.key(seed), images, labels, batches), jax.local_devices()[0])
    params = jax.tree.map(np.asarray, _fit(model, *data))
    fitted = Classifier(params, float("nan"), float("nan"), aside, images.shape[1:])
    right = extract(fitted, images[aside]).probabilities.argmax(-1) == labels[aside]
    share = right.mean()
    error = np.sqrt(share * (1 - share) / len(right))
    return fitted._replace(accuracy=float(share), accuracy_error=float(error))


def extract(
    classifier: Classifier,
    images: np.ndarray,
    *,
    batch_size: int = 256,
    devices: Sequence[jax.Device] | None = None,
) -> Outputs:
    """Computes features and class probabilities; the same for any batch size or number of devices.

    Args:
      classifier: from `train_classifier`.
      images: `(N, H, W, C)`, uint8 or in [-1, 1], of the size of those that it was trained on.
      batch_size: how many images are sent to the devices at a time.
      devices: which; all of this process by default.

    Returns:
      Features and probabilities, NumPy arrays.

    Raises:
      ValueError: the images are of another type or size.
    """
    images = _images.read(images, _MIN_SIZE)
    if images.shape[1:] != classifier.shape:
        raise ValueError(
            f"the classifier was trained on images of {classifier.shape}, got {images.shape[1:]}"
        )
    params = classifier.params
    return Outputs(*map_batches(_apply, params, images, batch_size=batch_size, devices=devices))


class _Network(nn.Module):
    """Images `(B, H, W, C)` in [-1, 1] to features and logits; halves the size down to 4."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
        while max(x.shape[1:3]) > _MAX_SIZE:
            x = nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)
        level = 0
        x = nn.relu(nn.GroupNorm(8)(dense(_WIDTHS[0], name="conv_0")(_patches(x, 1))))
        while max(x.shape[1:3]) > 4:
            level += 1
            width = _WIDTHS[min(level, len(_WIDTHS) - 1)]
            x = dense(width, name=f"conv_{level}")(_patches(x, 2))
            x = nn.relu(nn.GroupNorm(8)(x))
        features = nn.silu(dense(NUM_FEATURES, name="features")(x.reshape(len(x), -1)))
        return features, dense(self.num_classes, name="logits")(features)


def _patches(x: jax.Array, stride: int) -> jax.Array:
    """Returns the 3 x 3 surroundings of each pixel, `(B, H, W, 9 C)`.

    A dense layer of them is a convolution, whose gradient is as fast on CPUs as a matrix product.
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate([part[:, ::stride, ::stride] for part in shifted], -1)


def _apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    model = _Network(params["logits"]["bias"].shape[0])
    features, logits = model.apply({"params": params}, _scaled(images))
    return features, jax.nn.softmax(logits)


@functools.partial(jax.jit, static_argnums=0)
def _fit(
    model: _Network, key: jax.Array, images: jax.Array, labels: jax.Array, batches: jax.Array
) -> Any:
    """Trains on batches of indices `(steps, B)`; returns the parameters."""
    params = model.init(key, _scaled(images[:1]))["params"]
    rate = optax.cosine_decay_schedule(_LEARNING_RATE, len(batches))
    optimizer = optax.adamw(rate, weight_decay=1e-2)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        _, logits = model.apply({"params": params}, _scaled(images[rows]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params


def _scaled(images: jax.Array) -> jax.Array:
    x = jnp.asarray(images, jnp.float32)
    return x / 127.5 - 1 if images.dtype == jnp.uint8 else x


def _check(images: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    images = _images.read(images, _MIN_SIZE)
    if labels is None:
        raise ValueError(
            "a classifier needs labels, and these data have none: name a file of Inception weights "
            "for FID, or compare pixels by kernel_distance or sliced_wasserstein"
        )
    labels = np.asarray(labels)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers of the shape {images.shape[:1]}, got {labels.dtype} of "
            f"{labels.shape}"
        )
    classes = np.unique(labels)
    if classes[0] < 0 or len(classes) < 2:
        raise ValueError(f"labels must be of at least 2 classes, from 0, got {classes.tolist()}")
    return images, labels.astype(np.int32)
