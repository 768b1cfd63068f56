"""The sliced Wasserstein distance against closed forms, SciPy and quantiles."""

import numpy as np
import pytest

from jaxdiff import evaluation
from jaxdiff.evaluation import sliced


def test_distance_of_gaussians_is_the_closed_form():
    # W² of N(0, 1) and N(s u'd, 1): (s u'd)²; mean over the sphere s² |d|² / D.
    rng = np.random.default_rng(0)
    x, shift = rng.normal(size=(500, 6)), np.arange(6.0)
    found = evaluation.sliced_wasserstein(x, x + shift, projections=2000)
    assert found.value == pytest.approx(np.sqrt(55 / 6), abs=4 * found.error)
    assert found.error < 0.1
    # Scale: W² of N(0, 1) and N(0, 4) along any direction is 1.
    y = 2 * rng.normal(size=(4000, 6))
    found = evaluation.sliced_wasserstein(rng.normal(size=(5000, 6)), y, projections=100)
    assert found.value == pytest.approx(1, abs=0.03)


def test_error_is_that_of_other_directions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 5)), rng.normal(size=(50, 5)) * np.arange(1, 6)
    draws = [evaluation.sliced_wasserstein(x, y, projections=40, seed=i) for i in range(200)]
    values, errors = np.array(draws).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.25)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 18), (7, 5), (1, 9)])
def test_line_distance_is_that_of_quantiles(n, m):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)) + 1
    # Each point repeated until both have n m: the same distributions, matched one by one.
    a, b = (np.sort(np.repeat(z, r, axis=0), axis=0) for z, r in ((x, m), (y, n)))
    np.testing.assert_allclose(sliced._squares(x, y), ((a - b) ** 2).mean(0), rtol=1e-12)


def test_directions_are_seeded_and_more_begin_with_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(20, 4)) + 1
    first = evaluation.sliced_wasserstein(x, y, projections=64, seed=3)
    assert first == evaluation.sliced_wasserstein(x, y, projections=64, seed=3)
    assert first != evaluation.sliced_wasserstein(x, y, projections=64, seed=4)
    monkeypatch.setattr(sliced, "_CHUNK_VALUES", 100)
    again = evaluation.sliced_wasserstein(x, y, projections=64, seed=3)
    assert again == pytest.approx(first, rel=1e-12)
    assert evaluation.sliced_wasserstein(x, x).value == 0.0


def test_bad_input_is_refused():
    x = np.zeros((5, 2))
    with pytest.raises(ValueError, match="projections must be at least 2"):
        evaluation.sliced_wasserstein(x, x, projections=1)
    with pytest.raises(ValueError, match="features of one size"):
        evaluation.sliced_wasserstein(x, np.zeros((5, 3)))
