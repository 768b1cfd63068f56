"""The small classifier: what it learns, that it is the same every time, and what it refuses."""

import jax
import numpy as np
import pytest

from jaxdiff import evaluation
from jaxdiff.evaluation import classifier


def stripes(n=160, size=8, channels=1, seed=0):
    """Images of noise with stripes across or down, and which."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    pattern = np.broadcast_to(np.where(np.arange(size) % 2, 0.4, -0.4), (size, size))
    images = np.where(labels[:, None, None] == 1, pattern, pattern.T)[..., None]
    images = images + 0.2 * rng.normal(size=(n, size, size, channels))
    return np.clip(images, -1, 1).astype(np.float32), labels


@pytest.fixture(scope="module")
def fitted():
    return classifier.train_classifier(*stripes(), steps=30, batch_size=16)


def test_it_learns_and_says_how_well(fitted):
    assert len(fitted.held_out) == 32
    images, labels = stripes(seed=1)
    found = classifier.extract(fitted, images)
    assert found.features.shape == (160, classifier.NUM_FEATURES)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    unseen = (found.probabilities.argmax(1) == labels).mean()
    assert unseen > 0.9
    aside, of_aside = (part[fitted.held_out] for part in stripes())
    right = classifier.extract(fitted, aside).probabilities.argmax(1) == of_aside
    assert fitted.accuracy == pytest.approx(right.mean())
    assert fitted.accuracy_error == pytest.approx(right.std() / np.sqrt(32))
    # Features tell the classes apart, and the score sees two of them.
    sets = [found.features[labels == k][half::2] for k in (0, 1) for half in (0, 1)]
    a, same, b, _ = (evaluation.moments(x) for x in sets)
    assert evaluation.frechet_distance(a, b) > 5 * evaluation.frechet_distance(a, same)
    assert 1.3 < evaluation.inception_score(found.probabilities).mean <= 2


def test_the_same_seed_gives_the_same_bits(fitted):
    again = classifier.train_classifier(*stripes(), steps=30, batch_size=16)
    for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other = classifier.train_classifier(*stripes(), steps=30, batch_size=16, seed=1)
    assert set(other.held_out) != set(fitted.held_out)
    images = stripes(5)[0]
    assert np.any(
        classifier.extract(other, images).features != classifier.extract(fitted, images).features
    )


def test_features_do_not_depend_on_their_batch(fitted):
    images = stripes(75, seed=2)[0]
    whole = classifier.extract(fitted, images, devices=jax.devices()[:1])
    for batch_size, devices in ((1, 1), (50, 8), (256, 3)):
        found = classifier.extract(
            fitted, images, batch_size=batch_size, devices=jax.devices()[:devices]
        )
        np.testing.assert_array_equal(found.features, whole.features)
        np.testing.assert_array_equal(found.probabilities, whole.probabilities)
    alone = classifier.extract(fitted, images[7:8])
    np.testing.assert_allclose(alone.features[0], whole.features[7], rtol=1e-5, atol=1e-6)


def test_bytes_are_the_same_images(fitted):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    a = classifier.extract(fitted, images).features
    b = classifier.extract(fitted, images / 127.5 - 1).features
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 20, 3), (40, 33, 2), (256, 100, 3)])
def test_any_size_and_channels(shape):
    network = classifier._Network(4)
    variables = jax.eval_shape(network.init, jax.random.key(0), np.zeros((2, *shape), np.float32))
    features, logits = jax.eval_shape(network.apply, variables, np.zeros((2, *shape), np.float32))
    assert (features.shape, logits.shape) == ((2, classifier.NUM_FEATURES), (2, 4))
    sizes = [leaf.size for leaf in jax.tree.leaves(variables)]
    assert sum(sizes) < 600_000  # it stays small for large images


@pytest.mark.slow
def test_digits_are_learned_and_told_from_a_gaussian():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = np.round(digits.images[..., None] * 255 / 16).astype(np.uint8)
    fitted = classifier.train_classifier(images, digits.target)
    assert fitted.accuracy > 0.97
    flat = images.reshape(len(images), -1) / 255
    drawn = np.random.default_rng(0).multivariate_normal(flat.mean(0), np.cov(flat.T), size=898)
    drawn = np.round(np.clip(drawn, 0, 1) * 255).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    sets = [images[order[:898]], images[order[898:]], drawn]
    first, second, gaussian = (classifier.extract(fitted, x).features for x in sets)
    near, far = (
        evaluation.frechet_distance(evaluation.moments(first), evaluation.moments(x))
        for x in (second, gaussian)
    )
    assert far > 5 * near  # which is the bias of finite sets


def test_bad_data_are_refused(fitted):
    images, labels = stripes(20)
    train = classifier.train_classifier
    with pytest.raises(ValueError, match="needs labels, and these data have none: name a file"):
        train(images, None)
    with pytest.raises(ValueError, match=r"labels must be integers of the shape \(20,\), got f"):
        train(images, labels / 2)
    with pytest.raises(ValueError, match=r"at least 2 classes, from 0, got \[1\]"):
        train(images, labels * 0 + 1)
    with pytest.raises(ValueError, match=r"H and W at least 8, got \(20, 7, 8, 1\)"):
        train(images[:, 1:], labels)
    with pytest.raises(ValueError, match=r"uint8 in 0 .. 255 or floating in .*, got int64"):
        train(images.astype(np.int64), labels)
    with pytest.raises(ValueError, match="as large as nan"):
        train(images * np.nan, labels)
    with pytest.raises(ValueError, match="leaves a part empty"):
        train(images, labels, held_out=0.99)
    with pytest.raises(ValueError, match=r"images of \(8, 8, 1\), got \(8, 8, 3\)"):
        classifier.extract(fitted, np.repeat(images, 3, -1))
    with pytest.raises(ValueError, match=r"images of \(8, 8, 1\), got \(16, 16, 1\)"):
        classifier.extract(fitted, np.zeros((1, 16, 16, 1), np.uint8))
