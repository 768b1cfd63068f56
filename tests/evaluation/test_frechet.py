"""The Fréchet distance against closed forms, and its moments against float64, however gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxdiff import evaluation
from jaxdiff.evaluation import frechet
from tests import quick_to_compile

OFFSET = 1e4  # of features with a deviation near 1: float32 has 3 digits left behind the point


def features(n=1000, d=8, offset=OFFSET, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d)
    return (x + offset).astype(np.float32)


def folded(m):
    """Count, mean and covariance, in float64."""
    count = int(m.count)
    mean, outer, mean_low, outer_low = (np.asarray(part, np.float64) for part in m[1:])
    return count, mean + mean_low, (outer + outer_low) / (count - 1)


def assert_moments(m, x, tolerance):
    count, mean, covariance = folded(m)
    x = np.asarray(x, np.float64)
    assert count == len(x)
    np.testing.assert_allclose(mean, x.mean(0), rtol=0, atol=tolerance)
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=0, atol=tolerance)


def test_moments_on_the_host_are_those_of_float64():
    x = features()
    whole = evaluation.moments(x)
    assert whole.mean.dtype == whole.outer.dtype == np.float64
    assert_moments(whole, x, 1e-10)
    parts = [evaluation.moments(x[i : i + 77]) for i in range(0, len(x), 77)]
    assert_moments(functools.reduce(evaluation.merge, parts), x, 1e-10)
    assert_moments(functools.reduce(evaluation.merge, parts[::-1]), x, 1e-10)


@pytest.mark.parametrize("batch", [1, 37, 1000])
def test_moments_on_a_device_lose_no_digits_to_an_offset_or_to_batches(batch):
    x = features()
    total = None
    compute, merge = (
        jax.jit(function, compiler_options=quick_to_compile.FULL)
        for function in (evaluation.moments, evaluation.merge)
    )
    for start in range(0, len(x), batch):
        rows = np.full((batch, x.shape[1]), np.nan, np.float32)  # what fills up does not count
        part = x[start : start + batch]
        rows[: len(part)] = part
        new = compute(jnp.asarray(rows), np.arange(batch) < len(part))
        total = new if total is None else merge(total, new)
    assert total.mean.dtype == jnp.float32
    assert_moments(total, x, 1e-6)
    # Sums of squares would have nothing left, and a float32 mean is off by more than the bound.
    naive = x.T @ x / len(x) - np.outer(x.mean(0), x.mean(0))
    assert np.abs(naive - np.cov(x.T)).max() > 1
    assert np.abs(np.asarray(total.mean, np.float64) - x.mean(0, dtype=np.float64)).max() > 1e-5


@pytest.mark.parametrize("rows", [[125] * 8, [300, 0, 1, 99, 0, 250, 50, 300]])
def test_devices_give_what_one_gives(rows):
    x = features()
    held = np.full((8, 300, x.shape[1]), np.nan, np.float32)
    for device, part in enumerate(np.split(x, np.cumsum(rows)[:-1])):
        held[device, : len(part)] = part
    mask = np.arange(300)[None] < np.asarray(rows)[:, None]

    def local(x, mask):
        halves = [evaluation.moments(x[0, i::2], mask[0, i::2]) for i in (0, 1)]
        return evaluation.merge_over(evaluation.merge(*halves), "data")

    split, every = PartitionSpec("data"), PartitionSpec()
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=every)
    # The effort counts: what is fused is not always rounded in between.
    whole = jax.jit(mapped, compiler_options=quick_to_compile.FULL)
    assert_moments(whole(held, mask), x, 1e-6)
    by_pmap = jax.pmap(local, axis_name="data")(held[:, None], mask[:, None])
    assert_moments(jax.tree.map(lambda leaf: leaf[3], by_pmap), x, 1e-6)


def test_nothing_merges_as_nothing():
    x = features(50)
    nothing = evaluation.moments(jnp.asarray(x), np.zeros(50, bool))
    assert not any(np.any(leaf) for leaf in nothing)
    some = evaluation.moments(jnp.asarray(x))
    for merged in (evaluation.merge(nothing, some), evaluation.merge(some, nothing)):
        for a, b in zip(merged, some, strict=True):
            np.testing.assert_array_equal(a, b)


def normal(mean, covariance):
    return evaluation.Gaussian(np.asarray(mean, float), np.asarray(covariance, float))


def test_distance_of_gaussians_is_the_closed_form():
    # Commuting covariances: sum (sqrt a - sqrt b)²; in any basis.
    a, b = np.array([4.0, 1.0, 0.0, 9.0]), np.array([1.0, 1.0, 2.0, 0.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    shift = np.array([1.0, 2.0, 0.0, -1.0])
    found = evaluation.frechet_distance(
        normal(np.zeros(4), rotation * a @ rotation.T), normal(shift, rotation * b @ rotation.T)
    )
    assert found == pytest.approx(6 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-13)
    # Two dimensions, not commuting: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    found = evaluation.frechet_distance(normal([0, 0], a), normal([0, 0], b))
    assert found == pytest.approx(np.trace(a + b) - 2 * overlap, rel=1e-13)


def test_singular_covariances_cost_no_digits():
    # 20 examples of 200 features: the closed form in the small space that they span.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 200)), rng.normal(size=(15, 200)) + 0.5
    xc, yc = x - x.mean(0), y - y.mean(0)
    overlap = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt(19 * 14)
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + (xc**2).sum() / 19 + (yc**2).sum() / 14 - 2 * overlap
    found = evaluation.frechet_distance(evaluation.moments(x), evaluation.moments(y))
    assert found == pytest.approx(expected, rel=1e-12)
    again = evaluation.moments(x)
    assert evaluation.frechet_distance(again, again) == pytest.approx(0, abs=1e-10)
    constant = evaluation.moments(np.ones((5, 200)))
    assert evaluation.frechet_distance(constant, constant) == 0.0


def test_bias_and_error_are_those_of_many_draws():
    # N(0, I) against N(1, 1.21 I), 4 dimensions: 4 (1 + 0.01) = 4.04.
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(100):
        x, y = rng.normal(size=(200, 4)), 1 + 1.1 * rng.normal(size=(120, 4))
        groups = [evaluation.grouped_moments(z) for z in (x, y)]
        draws.append(evaluation.frechet_jackknife(*groups))
    values, errors, biases = (np.array(part) for part in zip(*draws, strict=True))
    spread = values.std(ddof=1)  # known to 7 %
    assert np.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.3)
    assert (values - biases).mean() == pytest.approx(4.04, abs=4 * spread / 10)
    assert biases.mean() > 0.05  # and the uncorrected mean is off by as much
    fixed = evaluation.frechet_jackknife(normal(np.zeros(4), np.eye(4)), groups[1])
    assert fixed.error < draws[-1].error


def test_groups_do_not_depend_on_batches():
    x = features(103, offset=0)
    whole = evaluation.grouped_moments(x, 7)
    pairs = zip(
        evaluation.grouped_moments(x[:50], 7),
        evaluation.grouped_moments(x[50:], 7, first_index=50),
        strict=True,
    )
    for a, b in zip(whole, [evaluation.merge(*pair) for pair in pairs], strict=True):
        assert a.count == b.count
        np.testing.assert_allclose(folded(a)[2], folded(b)[2], atol=1e-12)
    total = functools.reduce(evaluation.merge, whole)
    assert_moments(total, x, 1e-12)


def test_files_are_read_back_and_pytorch_fids_too(tmp_path):
    x, y = features(40, offset=3), features(30, offset=4, seed=1)
    a, b = evaluation.moments(x), evaluation.moments(jnp.asarray(y))
    assert_moments(evaluation.merge(a, evaluation.to_host(b)), np.concatenate([x, y]), 1e-6)
    np.savez(tmp_path / "a.npz", **evaluation.to_arrays(a))
    with np.load(tmp_path / "a.npz") as file:
        assert sorted(file) == ["count", "mu", "sigma"]
        read = evaluation.from_arrays(file)
        plain = evaluation.from_arrays({name: file[name] for name in ("mu", "sigma")})
    assert isinstance(plain, evaluation.Gaussian)
    expected = evaluation.frechet_distance(a, b)
    for form in (read, plain):
        assert evaluation.frechet_distance(form, b) == pytest.approx(expected, rel=1e-12)
    both = evaluation.merge(read, evaluation.moments(y))
    assert_moments(both, np.concatenate([x, y]), 1e-10)


def test_bad_statistics_are_refused():
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    with pytest.raises(ValueError, match="statistics lack sigma"):
        evaluation.from_arrays({"mu": np.zeros(3)})
    with pytest.raises(ValueError, match=r"shapes \(D,\) and \(D, D\), got \(3,\) and \(2, 2\)"):
        evaluation.from_arrays(good | {"sigma": np.eye(2)})
    with pytest.raises(ValueError, match="must be finite"):
        evaluation.from_arrays(good | {"mu": np.full(3, np.nan)})
    with pytest.raises(ValueError, match="must hold real numbers"):
        evaluation.from_arrays(good | {"mu": np.array(["a", "b", "c"])})
    with pytest.raises(ValueError, match="not symmetric"):
        evaluation.from_arrays(good | {"sigma": np.triu(np.ones((3, 3)))})
    with pytest.raises(ValueError, match="integer of at least 2, got array"):
        evaluation.from_arrays(good | {"count": np.asarray(1)})
    negative = evaluation.Gaussian(np.zeros(3), -np.eye(3))
    with pytest.raises(ValueError, match="has the eigenvalue -1"):
        evaluation.frechet_distance(negative, negative)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"shape \(N, D\), got \(4,\)"):
        evaluation.moments(np.zeros(4))
    with pytest.raises(ValueError, match=r"mask must have the shape \(4,\), got \(3,\)"):
        evaluation.moments(np.zeros((4, 2)), np.ones(3, bool))
    two, three = (evaluation.moments(np.eye(n)) for n in (2, 3))
    with pytest.raises(ValueError, match="of 2 and 3 features"):
        evaluation.merge(two, three)
    with pytest.raises(ValueError, match="one on the host: apply to_host first"):
        evaluation.merge(two, evaluation.moments(jnp.eye(2)))
    with pytest.raises(ValueError, match="have 2 and 3 features"):
        evaluation.frechet_distance(two, three)
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        evaluation.frechet_distance(two, evaluation.moments(np.zeros((1, 2))))
    with pytest.raises(ValueError, match="must be finite"):
        evaluation.frechet_distance(two, evaluation.moments(np.full((3, 2), np.inf)))
    with pytest.raises(ValueError, match="at least 2 groups"):
        evaluation.grouped_moments(np.eye(3), 1)
    with pytest.raises(ValueError, match=r"samples must be at least 2 groups .* \[1, 1, 0\]"):
        frechet.frechet_jackknife(two, evaluation.grouped_moments(np.eye(2), 3))
