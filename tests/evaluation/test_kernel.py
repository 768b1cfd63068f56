"""The kernel distance against its definition in plain loops, and its error against many draws."""

import numpy as np
import pytest

from jaxdiff import evaluation
from jaxdiff.evaluation import kernel


def by_definition(x, y):
    """Eq. (2), pair by pair."""

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def own(z):
        return np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    return own(x) + own(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_value_and_error_are_by_definition(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(13, 3)), 0.5 + rng.normal(size=(9, 3))
    value, error = kernel.mmd(x, y)
    assert value == pytest.approx(by_definition(x, y), rel=1e-12)
    # The jackknife, by leaving out.
    variance = 0
    for n, without in (
        (13, [by_definition(np.delete(x, i, 0), y) for i in range(13)]),
        (9, [by_definition(x, np.delete(y, i, 0)) for i in range(9)]),
    ):
        variance += (n - 1) * np.var(without)
    assert error == pytest.approx(np.sqrt(variance), rel=1e-10)
    monkeypatch.setattr(kernel, "_CHUNK_VALUES", 30)  # several blocks
    assert kernel.mmd(x, y) == pytest.approx((value, error), rel=1e-12)


def test_closed_form_and_error_for_gaussians():
    # k = sum over powers of x'y/D; E x'y = |m|², E (x'y)² and so on by moments; here D = 1:
    # E (xy + 1)³ = 1 + 3 m1 m1' + 3 m2 m2' + m3 m3', with the raw moments m.
    def raw(mean):
        return np.array([mean, mean**2 + 1, mean**3 + 3 * mean])

    weights = np.array([3, 3, 1])
    expected = (weights * (raw(0) - raw(0.5)) ** 2).sum()
    rng = np.random.default_rng(0)
    draws = np.array(
        [kernel.mmd(rng.normal(size=(60, 1)), 0.5 + rng.normal(size=(80, 1))) for _ in range(300)]
    )
    spread = draws[:, 0].std(ddof=1)
    assert draws[:, 0].mean() == pytest.approx(expected, abs=4 * spread / np.sqrt(300))
    errors = np.sqrt((draws[:, 1] ** 2).mean())
    assert 0.8 * spread < errors < 1.6 * spread


def test_subsets_are_seeded_and_unbiased():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(150, 4)), 0.7 + rng.normal(size=(120, 4))
    first = evaluation.kernel_distance(x, y, subsets=200, subset_size=50, seed=1)
    assert first == evaluation.kernel_distance(x, y, subsets=200, subset_size=50, seed=1)
    other = evaluation.kernel_distance(x, y, subsets=200, subset_size=50, seed=2)
    assert first.subset_mean != other.subset_mean
    assert first.value == other.value
    reach = 4 * first.subset_deviation / np.sqrt(200)
    assert first.subset_mean == pytest.approx(first.value, abs=reach)
    assert first.high - first.value == pytest.approx(1.959964 * first.error, rel=1e-6)
    assert first.value - first.low == pytest.approx(first.high - first.value)
    # A subset of everything is eq. (2) itself.
    whole = evaluation.kernel_distance(x[:120], y, subsets=3, subset_size=1000)
    assert whole.subset_mean == pytest.approx(whole.value, rel=1e-12)
    assert whole.subset_deviation == pytest.approx(0, abs=1e-12)


def test_one_distribution_is_at_no_distance():
    x = np.random.default_rng(0).normal(size=(800, 4))
    found = evaluation.kernel_distance(x[:400], x[400:], subsets=1)
    assert abs(found.value) < 4 * found.error


def test_bad_input_is_refused():
    x = np.zeros((5, 2))
    with pytest.raises(ValueError, match=r"shape \(N, D\), got \(5, 2, 2\): flatten"):
        evaluation.kernel_distance(np.zeros((5, 2, 2)), x)
    with pytest.raises(ValueError, match="features of one size, got 2 and 3"):
        evaluation.kernel_distance(x, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="samples must be finite"):
        evaluation.kernel_distance(x, x * np.nan)
    with pytest.raises(ValueError, match="real must have at least 2 rows, got 1"):
        evaluation.kernel_distance(x[:1], x)
    with pytest.raises(ValueError, match="at least 1 subset of at least 2"):
        evaluation.kernel_distance(x, x, subset_size=1)
    with pytest.raises(ValueError, match="confidence must be in"):
        evaluation.kernel_distance(x, x, confidence=95)
    assert np.isnan(kernel.mmd(x[:2], x)[1])
