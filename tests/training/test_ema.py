"""Averages of parameters: their profiles in closed form, and other widths found afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training import ema


def profile(decay, updates):
    """The weights that the parameters after each update have in the end, from the decays."""
    decays = np.asarray(decay(jnp.arange(updates)), np.float64)
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    return (1 - decays) * later


# The exponents that belong to the paper's widths (Karras et al. 2024, section 3.1).
@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_power_average_has_the_profile_of_the_closed_form(sigma_rel, gamma):
    updates = 3000
    got = profile(ema.power(sigma_rel), updates)
    # The integral of eq. (1) over each update.
    expected = np.diff((np.arange(updates + 1) / updates) ** (gamma + 1))
    np.testing.assert_allclose(np.cumsum(got), np.cumsum(expected), atol=2e-4)
    np.testing.assert_allclose(got.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.288])
@pytest.mark.parametrize("updates", [1000, 3000])
def test_a_width_is_a_share_of_the_training_so_far(sigma_rel, updates):
    weights, n = profile(ema.power(sigma_rel), updates), np.arange(1, updates + 1)
    mean = np.sum(weights * n)
    width = np.sqrt(np.sum(weights * (n - mean) ** 2)) / updates
    np.testing.assert_allclose(width, sigma_rel, rtol=5e-3)


def test_a_half_life_halves_what_was_and_is_short_at_first():
    decay = ema.half_life(100)
    np.testing.assert_allclose(np.prod(decay(jnp.arange(5000, 5100))), 0.5, rtol=1e-5)
    np.testing.assert_allclose(decay(jnp.int32(400)), 0.5 ** (1 / 20), rtol=1e-6)
    np.testing.assert_allclose(ema.half_life(100, 0.25)(40), 0.5 ** (1 / 10), rtol=1e-6)
    assert decay(jnp.int32(0)) == 0  # nothing is left of the initial parameters
    assert ema.half_life(1e-6)(1000) == 0


@functools.cache
def tracked(updates=2000, every=100):
    """Parameters that converge and jitter, and their averages by definition, in float64."""
    rng = np.random.default_rng(0)
    n = np.arange(1, updates + 1)[:, None]
    walk = np.cumsum(rng.normal(size=(updates, 64)), axis=0) / np.sqrt(updates)
    params = walk + 3 * np.exp(-n / 300) + 0.3 * rng.normal(size=(updates, 64))
    averages = {}
    for sigma_rel in (0.03, 0.05, 0.07, 0.1, 0.15, 0.2):
        decays = np.asarray(ema.power(sigma_rel)(jnp.arange(updates)), np.float64)
        average = params[0]
        for count, (theta, d) in enumerate(zip(params, decays, strict=True), 1):
            average = d * average + (1 - d) * theta
            if count % every == 0:
                averages[sigma_rel, count] = average
    return averages


# The error of what is reconstructed from 20 snapshots of each of two widths, and that of the nearer
# of the two snapshots of that count, relative to the norm.
@pytest.mark.parametrize(
    ("sigma_rel", "count", "most", "nearest"),
    [
        (0.07, 2000, 2e-4, 0.05),
        (0.07, 1500, 4e-4, 0.04),
        (0.15, 2000, 5e-4, 0.1),
        (0.2, 2000, 6e-3, 0.3),
        (0.03, 2000, 3e-3, 0.05),
    ],
)
def test_another_width_is_found_afterwards(sigma_rel, count, most, nearest):
    averages = tracked()
    snapshots = [(width, n) for width in (0.05, 0.1) for n in range(100, 2001, 100)]
    weights = ema.posthoc_weights(snapshots, sigma_rel, count)
    assert weights.dtype == np.float64
    assert abs(weights.sum() - 1) < 5e-3
    got = ema.combine((averages[key] for key in snapshots), weights)
    wanted = averages[sigma_rel, count]

    def error(value):
        return np.linalg.norm(value - wanted) / np.linalg.norm(wanted)

    near = min(error(averages[width, count]) for width in (0.05, 0.1))
    assert error(got) < most
    assert near > nearest


@pytest.mark.parametrize("position", [0, 3, 19])
def test_a_stored_snapshot_is_its_own_reconstruction(position):
    snapshots = [(width, n) for width in (0.05, 0.1) for n in range(100, 1001, 100)]
    weights = ema.posthoc_weights(snapshots, *snapshots[position])
    np.testing.assert_allclose(weights, np.eye(len(snapshots))[position], atol=1e-9)
    # A snapshot given twice shares its weight.
    twice = ema.posthoc_weights([*snapshots, snapshots[position]], *snapshots[position])
    np.testing.assert_allclose(twice[[position, -1]], 0.5, atol=1e-9)


def test_weights_and_residual_are_those_of_quadrature():
    snapshots = [(0.05, 400), (0.05, 1000), (0.1, 700), (0.1, 1000), (0.2, 1300)]
    t = (np.arange(200_000) + 0.5) / 200_000 * 1300

    def p(sigma_rel, count):
        gammas = np.linspace(0, 40, 400_001)  # eq. (2) by table, and eq. (1)
        widths = np.sqrt(gammas + 1) / ((gammas + 2) * np.sqrt(gammas + 3))
        gamma = np.interp(-sigma_rel, -widths, gammas)
        return np.where(t <= count, (gamma + 1) * (t / count) ** gamma / count, 0)

    columns, wanted = np.stack([p(*key) for key in snapshots], axis=1), p(0.07, 1000)
    expected, *_ = np.linalg.lstsq(columns, wanted)
    weights = ema.posthoc_weights(snapshots, 0.07, 1000)
    np.testing.assert_allclose(weights, expected, atol=1e-3)
    for x in (weights, np.full(5, 0.2)):
        residual = np.linalg.norm(wanted - columns @ x) / np.linalg.norm(wanted)
        np.testing.assert_allclose(
            ema.posthoc_residual(snapshots, x, 0.07, 1000), residual, rtol=1e-3
        )


def test_trees_are_combined_one_at_a_time_in_float64():
    alive = []

    def trees():
        for number in range(3):
            alive.append(number)
            yield {"a": jnp.full((2, 3), 1 + number, jnp.bfloat16), "b": jnp.float32(1e8 * number)}

    got = ema.combine(trees(), [3.0, -1.5, 0.5])
    assert alive == [0, 1, 2]
    assert got["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got["a"], np.float32), np.full((2, 3), 1.5))
    assert got["b"] == np.float32(-0.5e8)
    one = [{"x": np.float32(v)} for v in (1, 1e-4, -1)]  # in float32 much of it would be lost
    np.testing.assert_allclose(ema.combine(one, [1e4, 1, 1e4])["x"], np.float32(1e-4), rtol=1e-6)


def test_averages_run_compiled():
    @jax.jit
    def run(params):
        def one(averages, now):
            theta, count = now
            updated = [
                ema.update(average, theta, decay(count))
                for average, decay in zip(averages, decays, strict=True)
            ]
            return updated, None

        decays = [ema.power(0.1), ema.half_life(50)]
        start = [jnp.full(3, 1e6)] * 2  # forgotten at once
        return jax.lax.scan(one, start, (params, jnp.arange(len(params))))[0]

    params = np.random.default_rng(1).normal(size=(500, 3)).astype(np.float32)
    for decay, got in zip([ema.power(0.1), ema.half_life(50)], run(params), strict=True):
        np.testing.assert_allclose(got, profile(decay, 500) @ params, atol=1e-5)


def test_bad_arguments_are_refused():
    for width in (0, -0.1, 0.2887, 0.3, np.nan):
        with pytest.raises(ValueError, match=r"sigma_rel must lie in \(0, 0.2887\)"):
            ema.power(width)
        with pytest.raises(ValueError, match=r"sigma_rel must lie in"):
            ema.posthoc_weights([(0.1, 10)], width, 10)
    for arguments in ((0,), (-1,), (np.inf,), (10, 0)):
        with pytest.raises(ValueError, match="must be positive and finite"):
            ema.half_life(*arguments)
    with pytest.raises(ValueError, match="at least one snapshot"):
        ema.posthoc_weights([], 0.1, 10)
    for count in (0, np.nan):
        with pytest.raises(ValueError, match="count of updates must be positive"):
            ema.posthoc_weights([(0.1, count)], 0.1, 10)
    with pytest.raises(ValueError, match=r"2 snapshots need weights of shape \(2,\), got \(1,\)"):
        ema.posthoc_residual([(0.1, 5), (0.1, 10)], np.ones(1), 0.1, 10)
    tree = {"a": np.ones(2)}
    for trees, weights in (([], []), ([tree], [1, 2]), ([tree] * 3, [1, 2])):
        with pytest.raises(ValueError, match="a weight for each"):
            ema.combine(trees, weights)
    with pytest.raises(ValueError, match="structure"):
        ema.combine([tree, {"b": np.ones(2)}], [1, 2])
