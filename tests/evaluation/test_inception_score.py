"""The Inception Score against its definition in plain loops."""

import itertools

import numpy as np
import pytest

from jaxdiff import evaluation


def by_definition(p):
    q = [np.mean(column) for column in p.T]
    terms = [sum(a * np.log(a / b) for a, b in zip(row, q, strict=True) if a > 0) for row in p]
    return np.exp(np.mean(terms))


def probabilities(n=103, classes=5, seed=0):
    p = np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), size=n)
    p[::7] = np.eye(classes)[0]  # zeros, too
    return p


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_score_is_by_definition(splits):
    p = probabilities()
    found = evaluation.inception_score(p, splits=splits)
    edges = [i * 103 // splits for i in range(splits + 1)]
    parts = [by_definition(p[a:b]) for a, b in itertools.pairwise(edges)]
    assert found.mean == pytest.approx(np.mean(parts), rel=1e-12)
    assert found.deviation == pytest.approx(np.std(parts), rel=1e-10, abs=1e-12)
    assert found.value == pytest.approx(by_definition(p), rel=1e-12)


def test_error_is_the_jackknifes():
    p = probabilities(30)
    left = [by_definition(np.delete(p, i, 0)) for i in range(30)]
    expected = np.sqrt(29 * np.var(left))
    assert evaluation.inception_score(p).error == pytest.approx(expected, rel=1e-9)


def test_ends_of_the_range():
    sure = evaluation.inception_score(np.tile(np.eye(7), (20, 1)), splits=2)
    assert sure.mean == pytest.approx(7)
    assert evaluation.inception_score(np.full((20, 7), 1 / 7)).mean == pytest.approx(1)
    collapsed = evaluation.inception_score(np.tile(np.eye(7)[2], (20, 1)))
    assert collapsed.mean == pytest.approx(1)
    assert collapsed.error == pytest.approx(0, abs=1e-7)


def test_bad_probabilities_are_refused():
    p = probabilities()
    with pytest.raises(ValueError, match="apply softmax to logits"):
        evaluation.inception_score(np.log(p + 1))
    with pytest.raises(ValueError, match=r"splits must be in 1 \.\. 103"):
        evaluation.inception_score(p, splits=104)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        evaluation.inception_score(p[:1])
