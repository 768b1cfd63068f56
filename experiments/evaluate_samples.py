"""How good samples are, for `experiments.evaluate`.

Scores are of images as they are seen, of 256 levels. Standard errors are for other samples and
other real images of the same distributions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import build, report, runs, runtime, scores
from jaxdiff import data, evaluation, interop, viz
from jaxdiff.evaluation import classifier as classifiers
from jaxdiff.evaluation import inception as inceptions

CLASSIFIER_NEIGHBOURS = 3
FOLDS = 5
BATCH = 1000  # images decoded at a time
HALVES = 20
MOST_PAIRS = 10_000  # images of a side, where the time grows with the square
MOST_DIFFERENCES = 5e9  # of pixels, where every one of them counts

Scores = dict[str, dict[str, float | None]]


def load_samples(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the images, uint8, and the labels, if any, of a file of samples, or of its shares.

    Raises:
      RunError: there is no such file, or it is damaged.
    """
    found = report.load_samples(path)
    return found["images"], found.get("labels")


def gather(config: ConfigDict, source: data.Source) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns all images, uint8, of the size that the network sees, and their labels, if any."""
    size = min(len(source), BATCH)
    batches = build.in_order(config, source, size)
    found = [next(batches) for _ in range(0, len(source), size)]
    images = np.concatenate([viz.to_uint8(batch["x0"]) for batch in found])[: len(source)]
    if "cond" not in found[0]:
        return images, None
    return images, np.concatenate([batch["cond"] for batch in found])[: len(source)]


def check(images: np.ndarray, real: np.ndarray) -> None:
    """Checks that samples can be compared with the data.

    Raises:
      ValueError: they differ in shape, or are too few.
    """
    if real.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"samples have the shape {images.shape[1:]}, the run's images {real.shape[1:]}: are "
            "they another run's?"
        )
    if len(images) < 2 * HALVES:
        raise ValueError(
            f"scores of samples need at least {2 * HALVES} of them, got {len(images)}: draw more "
            "by --num"
        )


def manifold(
    images: np.ndarray, real: np.ndarray, *, neighbours: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Returns precision, recall, density and coverage of pixels.

    Args:
      images: samples, uint8 `(N, *spatial, C)`.
      real: real images, the same.
      neighbours: k of `evaluation.manifold_scores`.
      seed: of which images are compared where there are too many, and of the errors.
    """
    most = int(np.sqrt(MOST_DIFFERENCES / images[0].size))
    images, real = (_some(of, most, seed) for of in (images, real))
    found = evaluation.half_samples(
        lambda real, images: evaluation.manifold_scores(real, images, k=neighbours),
        _pixels(real), _pixels(images), num=HALVES, seed=seed,
    )  # fmt: skip
    names = evaluation.Manifold._fields
    return {
        "num": len(images),
        "real": len(real),
        "neighbours": neighbours,
        "scores": {
            name: scores.score(*pair)
            for name, *pair in zip(names, found.value, found.error, strict=True)
        },
    }


def sliced(images: np.ndarray, real: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Returns the sliced Wasserstein distance of pixels, in [0, 1]."""

    def distance(real: np.ndarray, images: np.ndarray) -> float:
        return evaluation.sliced_wasserstein(real, images, seed=seed).value

    found = evaluation.jackknife(distance, _pixels(real), _pixels(images))
    return {
        "num": len(images),
        "real": len(real),
        "scores": {"sliced Wasserstein distance": scores.score(found.value, found.error)},
    }


def classifier(
    images: np.ndarray,
    real: np.ndarray,
    labels: np.ndarray | None,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Returns distances by the features of a classifier trained on the real images' labels.

    Features are in units of the real ones' standard deviation, the mean over the features.

    Raises:
      ValueError: there are no labels.
    """
    fitted = classifiers.train_classifier(real, labels, seed=seed)
    of_real, of_images = (
        classifiers.extract(fitted, of, batch_size=batch_size) for of in (real, images)
    )
    unit = of_real.features.std(0).mean()  # of features that are of no unit of their own
    found = {
        "classifier's accuracy": scores.score(fitted.accuracy, fitted.accuracy_error),
        **_distances("classifier-", of_real.features / unit, of_images.features / unit, seed),
        **_inception_score("classifier-", of_images.probabilities),
    }
    return {"num": len(images), "real": len(real), "seed": seed, "scores": found}


def inception(
    images: np.ndarray,
    real: np.ndarray,
    weights: Path,
    *,
    resize: str = "pytorch",
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Returns FID, KID and Inception Score, by the network of published ones.

    The real images' features are kept in the cache of runs, under the fingerprints of the images
    and of the weights.

    Args:
      images: samples, uint8 `(N, *spatial, C)`.
      real: real images, the same.
      weights: the file of the network's weights.
      resize: as of `inception.prepare`.
      seed: of the subsets of KID.
      batch_size: how many images at a time.

    Raises:
      ValueError: the file does not hold these weights, or is damaged.
    """
    tensors = interop.read_tensors(weights)
    params = inceptions.from_tensors(tensors)

    def features(of: np.ndarray) -> np.ndarray:
        return inceptions.extract(params, of, resize=resize, batch_size=batch_size).features

    address = hashlib.sha256()
    for part in (runs.fingerprint(tensors), runs.fingerprint(real), resize):
        address.update(part.encode())
    of_real = cached(address.hexdigest(), lambda: features(real))
    of_images = inceptions.extract(params, images, resize=resize, batch_size=batch_size)
    logits = np.float64(of_images.logits_unbiased)  # as published
    odds = np.exp(logits - logits.max(1, keepdims=True))
    found = {
        **_distances("", of_real, of_images.features, seed, published=True),
        **_inception_score("", odds / odds.sum(1, keepdims=True)),
    }
    about = {"num": len(images), "real": len(real), "weights": weights.name, "resize": resize}
    return {**about, "seed": seed, "scores": found}


def cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns an array from the cache of runs, or makes it and keeps it there if that works."""
    folder = runtime.cache_folder() / "features"
    path = folder / f"{name}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or not whole
        array = make()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
    return array


def _distances(
    prefix: str, real: np.ndarray, images: np.ndarray, seed: int, *, published: bool = False
) -> Scores:
    grouped = (evaluation.grouped_moments(of) for of in (real, images))
    frechet = evaluation.frechet_jackknife(*grouped)
    kernel = evaluation.kernel_distance(
        *(_some(of, MOST_PAIRS, seed) for of in (real, images)), seed=seed
    )
    name = "FID" if published else f"{prefix}Frechet distance"
    found = {
        name: scores.score(frechet.value, frechet.error),
        f"{name}, less bias": scores.score(frechet.value - frechet.bias, frechet.error),
        f"{prefix}KID": scores.score(kernel.value, kernel.error),
    }
    if published:
        found["KID, mean of subsets"] = scores.score(kernel.subset_mean)
    return found


def _inception_score(prefix: str, probabilities: np.ndarray) -> Scores:
    found = evaluation.inception_score(probabilities)
    return {
        f"{prefix}Inception Score": scores.score(found.value, found.error),
        f"{prefix}Inception Score, mean of 10 splits": scores.score(found.mean),
    }


def classes(
    images: np.ndarray,
    labels: np.ndarray | None,
    real: np.ndarray,
    known: np.ndarray | None,
) -> dict[str, Any]:
    """Returns how many samples are of the class asked for.

    Args:
      images: samples, uint8 `(N, *spatial, C)`.
      labels: the classes asked for, `(N,)`.
      real: real images, the same.
      known: their classes.

    Raises:
      ValueError: there are no labels of samples or of real images.
    """
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    if known is None:
        raise ValueError("the data that the run was trained on have no labels")
    if labels is None:
        raise ValueError("the samples hold no labels: they were not asked for by class")
    nearest = KNeighborsClassifier(CLASSIFIER_NEIGHBOURS)
    agree = nearest.fit(_pixels(real), known).predict(_pixels(images)) == labels
    accuracy = cross_val_score(nearest, _pixels(real), known, cv=FOLDS).mean()
    return {
        "num": len(images),
        "real": len(real),
        "agreement_by_class": {
            str(label): float(agree[labels == label].mean()) for label in np.unique(labels)
        },
        "scores": {
            "of the class asked for": _share(agree.mean(), len(agree)),
            "classifier's accuracy": _share(accuracy, len(real)),
        },
    }


def _share(share: float, num: int) -> dict[str, float | None]:
    return scores.score(share, np.sqrt(share * (1 - share) / num))


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


def _some(images: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Returns so many of the images, chosen by a seed, or all if there are no more."""
    if len(images) <= most:
        return images
    return images[np.sort(np.random.default_rng(seed).permutation(len(images))[:most])]
