"""The forward process against products of Gaussians in float64, and by simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from jaxdiff import process, schedules
from jaxdiff.base import Node


def bayes_posterior(x0, x_t, now, next):
    """q(x_s | x_t, x0) as the product of q(x_s | x0) and q(x_t | x_s), in float64."""
    (at, st_), (as_, ss) = now, next
    ratio = at / as_
    v = st_**2 - ratio**2 * ss**2
    precision = 1 / ss**2 + ratio**2 / v
    return (as_ * x0 / ss**2 + ratio * x_t / v) / precision, 1 / precision


posterior = jax.jit(process.q_posterior)


@given(
    st.floats(0.05, 1.5),
    st.floats(0.03, 0.97),
    st.floats(0.5, 2),
    st.floats(-3, 3),
    st.floats(-3, 3),
)
def test_posterior_is_bayes_rule(angle, share, scale, x0, x_t):
    # Any two points, variance preserving (scale 1) or not.
    now = (np.cos(angle), np.sin(angle))
    next = (scale * np.cos(angle * share), scale * np.sin(angle * share))
    assume(now[1] ** 2 - (now[0] / next[0] * next[1]) ** 2 > 1e-3)  # else it is hardly a step
    mean, var = posterior(
        jnp.full((1, 1), x0), jnp.full((1, 1), x_t),
        Node(jnp.int32(1), *map(jnp.float32, now)), Node(jnp.int32(0), *map(jnp.float32, next)),
    )  # fmt: skip
    expected_mean, expected_var = bayes_posterior(x0, x_t, now, next)
    np.testing.assert_allclose(mean[0, 0], expected_mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(var, expected_var, rtol=2e-3)


def test_consecutive_posterior_is_that_of_the_paper():
    # Ho et al. 2020, eq. 7, from the betas in float64.
    schedule = schedules.linear()
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_bar = np.cumprod(1 - betas)
    t = np.arange(1, 1000)
    before = alphas_bar[t - 1]
    mean0 = np.sqrt(before) * betas[t] / (1 - alphas_bar[t])
    mean_t = np.sqrt(1 - betas[t]) * (1 - before) / (1 - alphas_bar[t])
    var = (1 - before) / (1 - alphas_bar[t]) * betas[t]
    now, next = schedule.at(t), schedule.at(t - 1)
    one, zero = jnp.ones((999, 1)), jnp.zeros((999, 1))
    np.testing.assert_allclose(process.q_posterior(one, zero, now, next)[0][:, 0], mean0, rtol=2e-4)
    got_mean, got_var = process.q_posterior(zero, one, now, next)
    np.testing.assert_allclose(got_mean[:, 0], mean_t, rtol=1e-5)
    np.testing.assert_allclose(got_var[:, 0], var, rtol=2e-4)
    np.testing.assert_allclose(process.step_variance(now, next), betas[t], rtol=2e-4)


def test_posterior_at_the_clean_node_is_the_clean_data():
    clean = Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))
    x0, x_t = jax.random.normal(jax.random.key(0), (2, 3, 4))
    for t in (0, 400, 999):
        mean, var = process.q_posterior(x0, x_t, schedules.linear().at(t), clean)
        np.testing.assert_allclose(mean, x0, rtol=1e-6)
        assert np.all(np.asarray(var) == 0)


def test_steps_compose_to_the_closed_form():
    # T steps with known noise against the closed form with the noise that they add up to.
    schedule = schedules.linear(50, 1e-3, 0.2)
    x0 = np.asarray(jax.random.normal(jax.random.key(0), (3, 4, 1)), np.float64)
    noise = np.asarray(jax.random.normal(jax.random.key(1), (50, 3, 4, 1)), np.float64)
    x, total = jnp.asarray(x0, jnp.float32), np.zeros_like(x0)
    step = jax.jit(process.q_step)
    for t in range(50):
        x = step(schedule, x, jnp.int32(t), jnp.asarray(noise[t], jnp.float32))
        beta = np.linspace(1e-3, 0.2, 50)[t]
        total = np.sqrt(1 - beta) * total + np.sqrt(beta) * noise[t]
        node = schedule.at(t)
        eps = jnp.asarray(total / float(node.sigma), jnp.float32)
        closed = process.q_sample(schedule, jnp.asarray(x0, jnp.float32), t, eps)
        np.testing.assert_allclose(x, closed, atol=3e-6)


def test_forward_chain_has_the_closed_form_moments():
    # 20,000 chains from one point; mean and variance at 20 nodes; false alarms 40 * 1e-6.
    schedule = schedules.linear(200, 1e-3, 0.1)
    n = 20_000
    x0 = jnp.full((n, 1), 0.7)
    chain = np.asarray(
        jax.jit(lambda: process.forward_chain(jax.random.key(0), schedule, x0, every=10))(),
        np.float64,
    )
    assert chain.shape == (21, n, 1)
    np.testing.assert_array_equal(chain[0], x0)
    bound = stats.norm.isf(0.5e-6)
    for k in range(20):
        node = schedule.at(10 * (k + 1) - 1)
        mean, std = 0.7 * float(node.alpha), float(node.sigma)
        assert abs(chain[k + 1].mean() - mean) < bound * std / np.sqrt(n)
        assert abs(chain[k + 1].var() / std**2 - 1) < bound * np.sqrt(2 / n)


def test_a_thinned_chain_is_the_whole_chain_thinned():
    schedule = schedules.linear(10, 1e-3, 0.1)
    x0 = jnp.ones((2, 3))
    whole = process.forward_chain(jax.random.key(0), schedule, x0)
    assert whole.shape == (11, 2, 3)
    thinned = process.forward_chain(jax.random.key(0), schedule, x0, every=4)
    np.testing.assert_allclose(thinned, whole[jnp.array([0, 4, 8, 10])], rtol=1e-6)


def test_sample_xt_is_an_address():
    schedule = schedules.linear()
    x0 = jax.random.normal(jax.random.key(1), (8, 4, 4, 1))
    key = jax.random.key(0)
    x_t, eps, t = process.sample_xt(key, schedule, x0)
    assert t.dtype == jnp.int32
    assert x_t.shape == eps.shape == x0.shape
    np.testing.assert_allclose(x_t, process.q_sample(schedule, x0, t, eps), rtol=1e-6)
    part = process.sample_xt(key, schedule, x0[4:], jnp.arange(4, 8))
    for got, expected in zip(part, (x_t, eps, t), strict=True):
        np.testing.assert_array_equal(got, expected[4:])


def test_sample_xt_draws_uniform_times_and_normal_noise():
    # False alarms: 3 at 1e-6.
    schedule = schedules.linear(10)
    n = 100_000
    _, eps, t = process.sample_xt(jax.random.key(0), schedule, jnp.zeros((n, 1)))
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-6
    assert stats.kstest(np.asarray(eps)[:, 0], "norm").pvalue > 1e-6
    corr = np.corrcoef(np.asarray(t), np.asarray(eps)[:, 0])[0, 1]
    assert abs(corr) < stats.norm.isf(0.5e-6) / np.sqrt(n)


def test_uniform_index_never_reaches_the_end():
    u = np.nextafter(np.float32(1), np.float32(0))
    for num_steps in (1, 3, 1000, 4000):
        assert int(process.uniform_index(jnp.asarray(u), num_steps)) == num_steps - 1


def test_sde_passes_through_the_marginals_of_the_chain():
    # d mean/dt = drift, d var/dt = -rate var + g², solved exactly over each constant piece.
    schedule = schedules.cosine(20)
    mean, var = 1.0, 0.0
    for t in range(20):
        drift, diffusion = process.sde(schedule, jnp.ones((1, 1)), t)
        decay = np.exp(float(drift[0, 0]) / 20)
        mean, var = mean * decay, 1 + (var - 1) * decay**2
        np.testing.assert_allclose(-2 * drift[0, 0], diffusion**2, rtol=1e-6)
        np.testing.assert_allclose(mean, schedule.at(t).alpha, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(var, schedule.at(t).sigma ** 2, rtol=1e-4)
    drift, diffusion = process.sde(schedule, jnp.ones((2, 3, 3, 1)), jnp.array([0, 5]))
    assert drift.shape == (2, 3, 3, 1)
    assert diffusion.shape == (2, 1, 1, 1)


def test_bad_arguments_are_refused():
    schedule = schedules.linear(10)
    x = jnp.zeros((2, 3, 3, 1))
    images = np.zeros((2, 3, 3, 1), np.uint8)
    calls = {"q_sample": process.q_sample, "q_step": process.q_step}
    for name, call in calls.items():
        first = "x0" if name == "q_sample" else "x_prev"
        with pytest.raises(TypeError, match=rf"{first} must be floating.*uint8.*127\.5"):
            call(schedule, images, 0, x)
        with pytest.raises(ValueError, match=rf"{first} and eps must have the same shape"):
            call(schedule, x, 0, x[..., :2, :])
        with pytest.raises(ValueError, match=r"t must lie in 0 \.\. 9, got values from 10"):
            call(schedule, x, 10, x)
        with pytest.raises(ValueError, match=r"t must lie in 0 \.\. 9"):
            call(schedule, x, np.array([-1, 3]), x)
        with pytest.raises(ValueError, match=r"t must have shape \(\) or \(2,\)"):
            call(schedule, x, np.array([1, 2, 3]), x)
        with pytest.raises(TypeError, match="integer index"):
            call(schedule, x, 0.5, x)
        # Unknown while tracing: the result says so instead of a clamped gather.
        assert np.isnan(jax.jit(call)(schedule, x, jnp.int32(10), x)).all()
    with pytest.raises(TypeError, match="x0 must be floating"):
        process.sample_xt(jax.random.key(0), schedule, images)
    with pytest.raises(TypeError, match="typed key"):
        process.sample_xt(jax.random.PRNGKey(0), schedule, x)
    with pytest.raises(ValueError, match="every must be at least 1"):
        process.forward_chain(jax.random.key(0), schedule, x, every=0)
