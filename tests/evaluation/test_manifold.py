"""Precision, recall, density and coverage against their definitions, point by point."""

import numpy as np
import pytest

from jaxdiff import evaluation


def by_definition(real, fake, k):
    """The definitions of the papers, in plain loops."""

    def radius(points, i):
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]  # [0] is the point itself

    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, j) for j in range(len(fake))]
    distance = np.linalg.norm(real[:, None] - fake, axis=2)
    n, m = distance.shape
    return (
        np.mean([any(distance[i, j] < real_radius[i] for i in range(n)) for j in range(m)]),
        np.mean([any(distance[i, j] < fake_radius[j] for j in range(m)) for i in range(n)]),
        sum(distance[i, j] < real_radius[i] for i in range(n) for j in range(m)) / (k * m),
        np.mean([any(distance[i, j] < real_radius[i] for j in range(m)) for i in range(n)]),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.7, 10.0])
def test_scores_are_those_of_the_papers(monkeypatch, k, shift):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(60, 3)), shift + 0.6 * rng.normal(size=(40, 3))
    expected = by_definition(real, fake, k)
    np.testing.assert_allclose(evaluation.manifold_scores(real, fake, k=k), expected)
    monkeypatch.setattr(evaluation.manifold, "_CHUNK_VALUES", 100)  # several chunks
    np.testing.assert_allclose(evaluation.manifold_scores(real, fake, k=k), expected)


def test_digits_score_as_stated():
    # Halves of the real digits: 0.97 and 0.97; a fitted Gaussian: 0.17 and 0.13.
    digits = pytest.importorskip("sklearn.datasets").load_digits().data
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits))
    halves = evaluation.manifold_scores(digits[order[:898]], digits[order[898:]])
    assert halves.precision > 0.94
    assert halves.coverage > 0.94
    gaussian = rng.multivariate_normal(digits.mean(0), np.cov(digits.T), size=1000)
    fitted = evaluation.manifold_scores(digits, gaussian)
    assert fitted.precision < 0.25
    assert fitted.coverage < 0.25


def test_bad_features_are_refused():
    x = np.zeros((10, 2))
    with pytest.raises(ValueError, match="more points than k"):
        evaluation.manifold_scores(x, x[:5])
    with pytest.raises(ValueError, match="features of one size"):
        evaluation.manifold_scores(x, np.zeros((10, 3)))
    with pytest.raises(ValueError, match="samples must be finite"):
        evaluation.manifold_scores(x, np.full((10, 2), np.nan))
