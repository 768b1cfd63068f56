"""Standard errors against closed forms and against the spread of many draws."""

import numpy as np
import pytest

from jaxdiff import evaluation


def gap(real, samples):
    return {"mean": samples.mean() - real.mean(), "square": samples.mean() ** 2}


def test_jackknife_of_means_is_the_closed_form():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=40), rng.normal(size=30)
    found = evaluation.jackknife(gap, x, y, groups=30)
    one_a_group = evaluation.jackknife(gap, y, y, groups=30, fixed_real=True)
    of_x = evaluation.jackknife(gap, x, x, groups=40, fixed_real=True)
    assert one_a_group.error["mean"] == pytest.approx(np.sqrt(y.var(ddof=1) / 30))
    assert of_x.error["mean"] == pytest.approx(np.sqrt(x.var(ddof=1) / 40))
    # 40 in 30 groups are of 1 and 2: the errors of both sides still add, up to chance.
    sides = np.hypot(one_a_group.error["mean"], of_x.error["mean"])
    assert found.error["mean"] == pytest.approx(sides, rel=0.2)
    assert found.bias["mean"] == pytest.approx(0, abs=1e-12)
    # The bias of a squared mean is var / n, exactly.
    assert one_a_group.bias["square"] == pytest.approx(y.var(ddof=1) / 30)


def test_unequal_groups_leave_means_unbiased():
    x = np.random.default_rng(0).normal(size=23)
    found = evaluation.jackknife(gap, x, x + 1, groups=5)
    assert found.bias["mean"] == pytest.approx(0, abs=1e-12)
    assert found.value["mean"] == pytest.approx(1)


def manifold(real, samples):
    return evaluation.manifold_scores(real, samples, k=3)


def test_errors_of_neighbours_are_those_of_many_draws():
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(40):
        x, y = rng.normal(size=(150, 3)), 0.4 + 0.8 * rng.normal(size=(120, 3))
        draws.append(evaluation.half_samples(manifold, x, y, num=10))
    spread = np.std([draw.value for draw in draws], axis=0, ddof=1)  # known to 11 %
    ratio = np.sqrt(np.mean(np.square([draw.error for draw in draws]), axis=0)) / spread
    assert (ratio > 0.75).all()  # not too small, and with some margin not too large
    assert (ratio[1:] < 1.9).all()
    assert draws[0].bias is None
    assert isinstance(draws[0].error, evaluation.Manifold)


def test_halves_are_seeded():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    first = evaluation.half_samples(gap, x, y, seed=1)
    assert first == evaluation.half_samples(gap, x, y, seed=1)
    assert first.error != evaluation.half_samples(gap, x, y, seed=2).error
    alone = evaluation.half_samples(gap, x, y, num=500, fixed_real=True)
    assert alone.error["mean"] == pytest.approx(np.sqrt(y.var(ddof=1) / 50), rel=0.15)


def test_bad_options_are_refused():
    x = np.zeros(9)
    with pytest.raises(ValueError, match="groups must be at least 2, got 1"):
        evaluation.jackknife(gap, x, x, groups=1)
    with pytest.raises(ValueError, match="real must have an example for each of 10 groups: 9"):
        evaluation.jackknife(gap, x, x)
    with pytest.raises(ValueError, match="num of at least 2"):
        evaluation.half_samples(gap, x, x, num=1)
