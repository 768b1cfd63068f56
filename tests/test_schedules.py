"""Schedules against exact arithmetic and published values."""

import dataclasses
from decimal import Decimal, getcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff import schedules

getcontext().prec = 60

ALL = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "quadratic": schedules.quadratic,
    "exponential": schedules.exponential,
    "sigmoid": schedules.sigmoid,
    "cosine": schedules.cosine,
}


def exact(betas):
    """Returns alpha_bar and the signal and noise standard deviations in 60 digits."""
    alphas_bar, product = [], Decimal(1)
    for beta in betas:
        product *= 1 - Decimal(float(beta))
        alphas_bar.append(product)
    alpha = [float(a.sqrt()) for a in alphas_bar]
    sigma = [float((1 - a).sqrt()) for a in alphas_bar]
    return np.array([float(a) for a in alphas_bar]), np.array(alpha), np.array(sigma)


@given(st.lists(st.floats(1e-9, 0.9), min_size=1, max_size=60))
def test_from_betas_equals_exact_arithmetic(betas):
    schedule = schedules.from_betas(betas)
    alphas_bar, alpha, sigma = exact(betas)
    tiny = np.finfo(np.float32).tiny  # results below it are 0 in float32
    np.testing.assert_allclose(schedule.alphas_bar, alphas_bar, rtol=2e-7, atol=tiny)
    np.testing.assert_allclose(schedule.nodes.alpha, alpha, rtol=2e-7, atol=tiny)
    np.testing.assert_allclose(schedule.nodes.sigma, sigma, rtol=2e-7)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-7)


def test_the_clean_end_keeps_its_digits():
    # In float32, 1 - alpha_bar_0 would be off by up to 6e-8 / 1e-6 = 6 %.
    schedule = schedules.from_betas([1e-6, 1e-6])
    np.testing.assert_allclose(schedule.nodes.sigma**2, [1e-6, 2e-6 - 1e-12], rtol=3e-7)


def test_linear_has_the_published_values():
    schedule = schedules.linear()
    assert schedule.num_steps == 1000
    np.testing.assert_allclose(schedule.betas[jnp.array([0, 999])], [1e-4, 0.02], rtol=1e-6)
    np.testing.assert_allclose(np.diff(schedule.betas), (0.02 - 1e-4) / 999, rtol=1e-3)
    # Ho et al. 2020, section 4: SNR at T such that KL(q(x_T | x0) || N(0, I)) is about 1e-5 bits
    # a dimension; the value of the public checkpoints' scheduler.
    np.testing.assert_allclose(schedule.alphas_bar[-1], 4.0358e-5, rtol=1e-4)


def test_latent_diffusion_has_the_published_values():
    schedule = schedules.scaled_linear()
    np.testing.assert_allclose(schedule.betas[jnp.array([0, 999])], [0.00085, 0.012], rtol=1e-6)
    np.testing.assert_allclose(schedule.alphas_bar[-1], 0.00466, rtol=1e-3)


def test_cosine_is_the_squared_cosine_until_it_is_clipped():
    for num_steps in (10, 1000, 4000):
        schedule = schedules.cosine(num_steps)
        t = np.arange(1, num_steps + 1) / num_steps
        f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        expected = f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        clipped = np.asarray(schedule.betas) >= 0.999
        assert clipped.sum() >= 1
        assert clipped[-1]
        np.testing.assert_allclose(schedule.alphas_bar[~clipped], expected[~clipped], rtol=1e-5)
        assert float(schedule.betas.max()) <= np.float32(0.999)


def test_shapes_of_the_named_curves():
    quadratic = np.sqrt(np.asarray(schedules.quadratic().betas, np.float64))
    np.testing.assert_allclose(np.diff(quadratic), np.diff(quadratic).mean(), rtol=1e-2)
    exponential = np.log(np.asarray(schedules.exponential().betas, np.float64))
    np.testing.assert_allclose(np.diff(exponential), np.diff(exponential).mean(), rtol=1e-2)
    sigmoid = np.asarray(schedules.sigmoid(1001).betas, np.float64)
    np.testing.assert_allclose(sigmoid[500], (1e-4 + 0.02) / 2, rtol=1e-5)  # odd about the middle
    np.testing.assert_allclose(sigmoid + sigmoid[::-1], 1e-4 + 0.02, rtol=1e-5)
    logit = np.log((sigmoid[1:-1] - 1e-4) / (0.02 - sigmoid[1:-1]))
    np.testing.assert_allclose(logit, np.linspace(-6, 6, 1001)[1:-1], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
def test_every_schedule_loses_signal_and_keeps_variance(name, num_steps):
    schedule = ALL[name](num_steps)
    chex.assert_shape([schedule.betas, schedule.alphas, schedule.alphas_bar], (num_steps,))
    chex.assert_tree_all_finite(schedule)
    assert np.all((schedule.betas > 0) & (schedule.betas < 1))
    np.testing.assert_allclose(schedule.alphas, 1 - schedule.betas, atol=1e-7)
    nodes = schedule.nodes
    np.testing.assert_allclose(nodes.alpha**2 + nodes.sigma**2, np.ones(num_steps), rtol=3e-7)
    if num_steps > 1:
        assert np.all(np.diff(schedule.log_snr(jnp.arange(num_steps))) < 0)


def test_from_alphas_bar_returns_what_it_was_given():
    betas = np.linspace(1e-4, 0.02, 100)
    alphas_bar = np.cumprod(1 - betas)
    schedule = schedules.from_alphas_bar(alphas_bar)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-6)
    np.testing.assert_allclose(schedule.alphas_bar, alphas_bar, rtol=1e-7)
    assert not schedule.ends_at_zero_snr
    zero = schedules.from_alphas_bar([0.9, 0.5, 0.0])
    assert zero.ends_at_zero_snr
    assert zero.at(2).alpha == 0
    assert zero.at(2).sigma == 1
    assert zero.log_snr(2) == -np.inf


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num_steps", [1, 50])
def test_time_is_the_inverse_of_log_snr(name, num_steps):
    schedule = ALL[name](num_steps)
    t = np.arange(num_steps)
    log_snr = schedule.log_snr(t)
    back = schedule.time(log_snr)
    assert jnp.issubdtype(back.dtype, jnp.floating)
    np.testing.assert_allclose(back, t, atol=1e-3)
    between = schedule.time((log_snr[:-1] + log_snr[1:]) / 2)
    np.testing.assert_allclose(between, t[:-1] + 0.5, atol=1e-3)
    # Held at the ends.
    np.testing.assert_array_equal(
        schedule.time(jnp.array([jnp.inf, 99.0, -99.0, -jnp.inf])),
        [0, 0, num_steps - 1, num_steps - 1],
    )


def test_time_where_the_signal_ends():
    schedule = schedules.from_alphas_bar([0.9, 0.5, 0.0])
    np.testing.assert_allclose(schedule.time(schedule.log_snr(np.arange(3))), [0, 1, 2], atol=1e-6)
    assert schedule.time(0.0) == 1
    assert 1 < float(schedule.time(-5.0)) < 2


def test_zero_terminal_snr_is_lin_et_al():
    before = schedules.scaled_linear()
    after = schedules.zero_terminal_snr(before)
    roots = np.sqrt(np.cumprod(1 - np.asarray(before.betas, np.float64)))
    expected = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    np.testing.assert_allclose(after.nodes.alpha, expected, rtol=2e-7)
    assert after.nodes.alpha[-1] == 0
    assert after.nodes.sigma[-1] == 1
    assert after.betas[-1] == 1
    assert after.ends_at_zero_snr
    assert not before.ends_at_zero_snr
    chex.assert_trees_all_close(after.at(0), before.at(0), rtol=2e-7)  # the clean end stays
    chex.assert_trees_all_close(schedules.zero_terminal_snr(after), after, rtol=1e-6, atol=1e-7)
    # A clipped cosine, whose last betas have few digits of 1 - beta.
    cosine = schedules.cosine(100)
    after = schedules.zero_terminal_snr(cosine)
    roots = np.asarray(cosine.nodes.alpha, np.float64)
    expected = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    np.testing.assert_allclose(after.nodes.alpha, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: schedules.zero_terminal_snr(schedules.linear(1)), "at least 2 steps, got 1"),
        (lambda: schedules.from_betas([0.1, 0.0]), r"betas\[1\] = 0\.0"),
        (lambda: schedules.from_betas([0.1, 1.0]), r"in \(0, 1\).*betas\[1\] = 1\.0"),
        (lambda: schedules.from_betas([-0.1]), r"betas\[0\] = -0\.1"),
        (lambda: schedules.from_betas([0.1, np.nan]), r"betas\[1\] = nan"),
        (lambda: schedules.from_betas([]), "vector"),
        (lambda: schedules.from_betas([[0.1]]), "vector"),
        (lambda: schedules.linear(beta_end=1.5), r"in \(0, 1\)"),
        (lambda: schedules.quadratic(beta_start=-1), "beta_start"),
        (lambda: schedules.exponential(beta_end=0), "beta_end"),
        (lambda: schedules.sigmoid(steepness=0), "steepness"),
        (lambda: schedules.linear(0), "num_steps"),
        (lambda: schedules.cosine(10.5), "num_steps"),
        (lambda: schedules.cosine(s=-1), "s must"),
        (lambda: schedules.from_alphas_bar([0.9, 0.9]), "decrease strictly"),
        (lambda: schedules.from_alphas_bar([1.0, 0.9]), "decrease strictly"),
        (lambda: schedules.from_alphas_bar([0.9, 0.0, -0.1]), "decrease strictly"),
    ],
)
def test_bad_schedules_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_at_refuses_what_is_out_of_range():
    schedule = schedules.linear(10)
    for t in (-1, 10, jnp.array([0, 10])):
        with pytest.raises(ValueError, match=r"t must lie in 0 \.\. 9"):
            schedule.at(t)
    with pytest.raises(TypeError, match="integer index"):
        schedule.at(0.5)
    # In a compiled program a gather would silently clamp.
    node = jax.jit(schedule.at)(jnp.array([-1, 0, 9, 10]))
    np.testing.assert_array_equal(np.isnan(node.alpha), [True, False, False, True])
    np.testing.assert_array_equal(np.isnan(node.sigma), [True, False, False, True])


def test_a_schedule_is_a_pytree_that_no_gradient_reaches():
    schedule = schedules.linear(10)
    node = jax.jit(lambda s, t: s.at(t))(schedule, jnp.array([0, 3]))
    chex.assert_trees_all_equal(node, schedule.at(jnp.array([0, 3])))

    def value(alpha, sigma):
        nodes = dataclasses.replace(schedule.nodes, alpha=alpha, sigma=sigma)
        moved = dataclasses.replace(schedule, nodes=nodes)
        return moved.at(3).alpha + moved.log_snr(3)

    for grad in jax.grad(value, (0, 1))(schedule.nodes.alpha, schedule.nodes.sigma):
        np.testing.assert_array_equal(grad, np.zeros(10))
    # Inside a compiled function a schedule is concrete still, whether closed over or made there.
    zero = schedules.from_alphas_bar([0.5, 0.0])
    assert jax.jit(lambda: jnp.array(zero.ends_at_zero_snr))()
    assert not jax.jit(lambda: jnp.array(schedules.linear(10).ends_at_zero_snr))()
