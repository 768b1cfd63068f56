"""The variational bound and its parts against closed forms and float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from jaxdiff import denoisers, likelihood, losses, schedules
from jaxdiff.base import Node, Prediction
from jaxdiff.process import q_posterior, reverse_variance, step_variance

HALF = 1 / 255


def node(log_snr):
    return Node(
        jnp.float32(0),
        jnp.sqrt(jax.nn.sigmoid(jnp.float32(log_snr))),
        jnp.sqrt(jax.nn.sigmoid(-jnp.float32(log_snr))),
    )


CLEAN = Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))


@given(st.floats(-8, 8), st.floats(0.01, 6), st.floats(0, 1))
def test_the_learned_variance_lies_between_the_others_for_any_stride(log_snr, gap, fraction):
    now, next = node(log_snr), node(log_snr + gap)
    small = reverse_variance("small", now, next)
    large = reverse_variance("large", now, next)
    np.testing.assert_allclose(
        small, q_posterior(jnp.zeros((1, 1)), jnp.zeros((1, 1)), now, next)[1], rtol=1e-6
    )
    np.testing.assert_allclose(large, step_variance(now, next), rtol=1e-6)
    got = reverse_variance("learned", now, next, jnp.float32(fraction))
    expected = (1 - fraction) * np.log(np.float64(small)) + fraction * np.log(np.float64(large))
    np.testing.assert_allclose(np.log(got), expected, rtol=1e-5, atol=1e-5)


def test_variances_at_the_clean_node():
    now, fraction = node(5.0), jnp.array([[0.0, 0.5, 1.0]])
    v = float(now.sigma) ** 2
    np.testing.assert_array_equal(reverse_variance("small", now, CLEAN), 0)
    np.testing.assert_array_equal(reverse_variance("learned", now, CLEAN, fraction), 0)
    least = v / 4
    np.testing.assert_allclose(reverse_variance("small", now, CLEAN, least=least), least, rtol=1e-6)
    np.testing.assert_allclose(
        reverse_variance("learned", now, CLEAN, fraction, least=least), [[v / 4, v / 2, v]],
        rtol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(reverse_variance("large", now, CLEAN), v, rtol=1e-6)
    grad = jax.grad(lambda f: reverse_variance("learned", now, CLEAN, f).sum())(fraction)
    np.testing.assert_array_equal(grad, 0)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-4, 2), st.floats(-4, 2))
def test_gaussian_kl_is_the_integral(mean1, mean2, log_std1, log_std2):
    p, q = stats.norm(mean1, np.exp(log_std1)), stats.norm(mean2, np.exp(log_std2))
    x = mean1 + np.exp(log_std1) * np.linspace(-12, 12, 4001)
    expected = integrate.simpson(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x=x)
    got = losses.gaussian_kl(*map(jnp.float32, (mean1, 2 * log_std1, mean2, 2 * log_std2)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def log_bin(x0, mean, std):
    """log(Phi(b) - Phi(a)) in float64, on the side of the smaller tail."""
    upper, lower = (x0 + HALF - mean) / std, (x0 - HALF - mean) / std
    upper = np.where(x0 > 1 - HALF, np.inf, upper)
    lower = np.where(x0 < -1 + HALF, -np.inf, lower)
    a, b = np.where(upper + lower < 0, lower, -upper), np.where(upper + lower < 0, upper, -lower)
    return special.log_ndtr(b) + np.log1p(-np.exp(special.log_ndtr(a) - special.log_ndtr(b)))


@pytest.mark.parametrize("std", [1e-6, 1e-4, 0.003, 0.05, 0.5, 3.0])
def test_discretized_log_likelihood_has_its_digits_everywhere(std):
    levels = np.linspace(-1, 1, 256)
    mean = np.array([-1.5, -0.7, 0.0, 0.301, 1.0])
    x0, mean = (a.ravel() for a in np.meshgrid(levels, mean))
    x0, mean = x0.astype(np.float32).astype(float), mean.astype(np.float32).astype(float)
    near = np.abs(x0 - mean) < 900 * std
    expected = log_bin(x0, mean, std)
    got, gradient = jax.jit(jax.vmap(jax.value_and_grad(losses.discretized_log_likelihood, 2)))(
        *(jnp.asarray(a, jnp.float32) for a in (x0, mean, np.full_like(x0, np.log(std))))
    )
    # In float32 the edges of a bin are off by 1e-7, which counts by the slope of the logarithm
    # there; and narrow bins are small differences of cumulative probabilities.
    slope = np.abs(x0 - mean) / std**2 + 1 / HALF
    allowed = 2e-7 * (slope + std / HALF) + 3e-6 * np.abs(expected) + 1e-5
    assert np.all(np.abs(got - expected)[near] < allowed[near])
    assert np.all(got > -510_000)  # that of 1000 standard deviations
    assert np.isfinite(gradient).all()
    numeric = (log_bin(x0, mean, std * 1.0001) - log_bin(x0, mean, std / 1.0001)) / 2e-4
    close = np.abs(x0 - mean) < 30 * std
    np.testing.assert_allclose(gradient[close], numeric[close], rtol=5e-3, atol=5e-3)


@given(st.floats(-2, 2), st.floats(-7, 2), st.sampled_from([2, 5, 256]))
def test_bins_sum_to_one(mean, log_std, num_levels):
    x0 = jnp.linspace(-1, 1, num_levels, dtype=jnp.float32)
    log_p = losses.discretized_log_likelihood(
        x0, jnp.full_like(x0, mean), jnp.float32(log_std), num_levels
    )
    np.testing.assert_allclose(np.exp(np.asarray(log_p, np.float64)).sum(), 1, atol=2e-4)


def test_learned_at_the_ends_is_small_and_large():
    schedule = schedules.cosine(10)
    x0, x_t = jax.random.uniform(jax.random.key(0), (2, 10, 6), minval=-1)
    t, least = jnp.arange(10), losses.first_variance(schedule)
    now, next = schedule.at(t), losses.node_before(schedule, t)
    np.testing.assert_array_equal(next.t, t - 1)
    np.testing.assert_array_equal(next.alpha[0], 1)
    np.testing.assert_array_equal(next.sigma[1:], now.sigma[:-1])

    def terms(variance, fraction):
        prediction = Prediction(0.9 * x0, fraction * jnp.ones_like(x0))
        return losses.bound_term(x0, x_t, prediction, now, next, variance, least=least)

    np.testing.assert_allclose(terms("learned", 0.0), terms("small", 0.0), rtol=1e-5)
    np.testing.assert_allclose(terms("learned", 1.0), terms("large", 0.0), rtol=1e-5)
    assert np.all(terms("small", 0.0)[1:] != terms("large", 0.0)[1:])


# Gaussian data of this width, of which only 3e-11 lie on the outermost bins.
STD = 0.15
EXACT = denoisers.gaussian(np.zeros((16,)), STD)
SCHEDULE = schedules.cosine(12)


def closed_form(schedule, variance_of, std=STD):
    """Returns prior, steps and decoder in bits, for the exact denoiser, in float64.

    `variance_of(small, large, best)` is the variance of the model's steps.
    """
    betas = np.asarray(schedule.betas, np.float64)
    abar = np.cumprod(1 - betas)
    spread = std**2 * (1 - abar) / (abar * std**2 + 1 - abar)  # E|x0 - E[x0 | x_t]|²
    before, now, beta, left = abar[:-1], abar[1:], betas[1:], spread[1:]
    small = beta * (1 - before) / (1 - now)
    gap = before * (beta / (1 - now)) ** 2 * left
    model = variance_of(small, beta, small + gap)
    steps = 0.5 * (small / model - 1 - np.log(small / model) + gap / model)
    # The decoder, integrated over what the prediction is off by.
    width = np.sqrt(spread[0])
    off = np.linspace(-9, 9, 20_001) * width
    decoder_std = np.sqrt(variance_of(small[0], betas[0], spread[0]))
    log_p = log_bin(np.zeros_like(off), off, decoder_std)
    decoder = -integrate.simpson(stats.norm.pdf(off, 0, width) * log_p, x=off)
    last = abar[-1]
    prior = 0.5 * (last * std**2 + (1 - last) - 1 - np.log(1 - last))
    return prior / np.log(2), steps / np.log(2), decoder / np.log(2)


def z_score(samples, expected):
    """By how many standard errors the mean over examples is off."""
    samples = np.asarray(samples, np.float64)
    return np.abs(samples.mean(-1) - expected) / (samples.std(-1) / np.sqrt(samples.shape[-1]))


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_bound_of_gaussian_data_has_its_closed_form(variance):
    # Means over 3000 examples; 14 terms, false alarm of each 4e-8.
    def denoiser(x, node):
        return EXACT.denoiser(x, node)._replace(variance=jnp.full_like(x, 0.4))

    x0 = EXACT.sample(jax.random.key(1), 3000)
    bits, terms = jax.jit(
        lambda x0: likelihood.variational_bound(
            jax.random.key(0), denoiser, SCHEDULE, x0, variance=variance
        )
    )(x0)
    prior, steps, decoder = closed_form(
        SCHEDULE,
        {
            "small": lambda small, large, best: small,
            "large": lambda small, large, best: large,
            "learned": lambda small, large, best: small**0.6 * large**0.4,
        }[variance],
    )
    assert terms.steps.shape == (11, 3000)
    np.testing.assert_allclose(bits, terms.prior + terms.steps.sum(0) + terms.decoder, rtol=1e-5)
    assert z_score(terms.prior, prior) < 5.5
    assert np.all(z_score(terms.steps, steps) < 5.5)
    assert z_score(terms.decoder, decoder) < 5.5
    assert z_score(bits, prior + steps.sum() + decoder) < 5.5


def test_the_bound_tends_to_the_entropy_of_the_levels():
    # Where the noise at index 0 is wider than a bin, data on levels are as good as continuous. Each
    # reverse step of Gaussian data is Gaussian: with the best variance nothing is lost in any
    # number of steps, and with another one less and less.
    levels = np.arange(-255, 256, 2) / 255
    p = stats.norm.cdf(levels + HALF, 0, STD) - stats.norm.cdf(levels - HALF, 0, STD)
    entropy = -np.sum(p * np.log2(p))

    def chain(num_steps):
        return schedules.from_alphas_bar(special.expit(np.linspace(7, -10, num_steps)))

    def gap(num_steps, variance_of):
        prior, steps, decoder = closed_form(chain(num_steps), variance_of)
        return prior + steps.sum() + decoder - entropy

    large = [gap(n, lambda small, large, best: large) for n in (10, 100, 1000, 10_000)]
    assert large[0] > 0.5
    assert np.all(np.diff(large) < 0)
    assert 0 < large[-1] < 0.005
    for num_steps in (10, 1000):
        assert abs(gap(num_steps, lambda small, large, best: best)) < 0.001

    # And the measured one, with the best variance learned: 20 steps, false alarm 4e-8.
    abar = np.asarray(chain(20).alphas_bar, np.float64)
    spread = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
    ratio = (1 - abar[:-1]) / (1 - abar[1:])
    betas = 1 - abar[1:] / abar[:-1]
    best = ratio + abar[:-1] * betas / (1 - abar[1:]) ** 2 * spread[1:]
    first = np.log(spread[0] / (1 - abar[0])) / np.log(betas[0] * ratio[0] / (1 - abar[0]))
    fraction = 1 - np.append(first, np.log(best) / np.log(ratio))
    assert np.all((fraction >= 0) & (fraction <= 1))
    fraction = jnp.asarray(fraction, jnp.float32)

    def denoiser(x, node):
        return EXACT.denoiser(x, node)._replace(variance=jnp.full_like(x, fraction[node.t]))

    x0 = jnp.round(EXACT.sample(jax.random.key(1), 3000) * 127.5 + 127.5) / 127.5 - 1
    bits, _ = jax.jit(
        lambda x0: likelihood.variational_bound(
            jax.random.key(0), denoiser, chain(20), x0, variance="learned"
        )
    )(x0)
    error = np.std(np.asarray(bits)) / np.sqrt(3000)
    assert error < 0.01
    assert abs(np.mean(np.asarray(bits, np.float64)) - entropy) < 0.005 + 5.5 * error


def bound(x0, **kwargs):
    return likelihood.variational_bound(
        jax.random.key(0), EXACT.denoiser, schedules.cosine(3), x0, **kwargs
    )


def test_an_example_s_bits_do_not_depend_on_the_batch_or_on_what_is_masked():
    x0 = EXACT.sample(jax.random.key(1), 6)
    whole, terms = bound(x0)
    part, part_terms = bound(x0[4:], index=jnp.arange(4, 6))
    np.testing.assert_allclose(part, whole[4:], rtol=1e-5)
    np.testing.assert_allclose(part_terms.steps, terms.steps[:, 4:], rtol=1e-5)
    # Noise is drawn for whole examples, so that the mask alone decides what counts.
    mask = jnp.arange(16) < 8
    dirty = jnp.where(mask, x0, jnp.nan)
    left, _ = bound(dirty, mask=mask)
    right, _ = bound(x0, mask=~mask)
    np.testing.assert_allclose((left + right) / 2, whole, rtol=1e-5)
    assert np.all(np.abs(left - right) > 1e-4)


def test_one_step_is_a_decoder_and_a_prior():
    bits, terms = likelihood.variational_bound(
        jax.random.key(0), EXACT.denoiser, schedules.from_betas([0.5]), jnp.zeros((2, 16))
    )
    assert terms.steps.shape == (0, 2)
    np.testing.assert_allclose(bits, terms.prior + terms.decoder, rtol=1e-6)
    np.testing.assert_allclose(losses.first_variance(schedules.from_betas([0.5])), 0.5, rtol=1e-6)


def test_bad_arguments_are_refused():
    x0 = jnp.zeros((2, 16))
    for kwargs, match in (
        ({"variance": "tiny"}, 'variance must be "small", "large" or "learned"'),
        ({"variance": "learned"}, "learned_variance=True"),
        ({"num_levels": 1}, "num_levels must be at least 2"),
        ({"mask": jnp.ones((3, 3))}, "mask must broadcast"),
    ):
        with pytest.raises(ValueError, match=match):
            bound(x0, **kwargs)
    with pytest.raises(TypeError, match="x0 must be floating"):
        bound(jnp.zeros((2, 16), jnp.uint8))
    with pytest.raises(ValueError, match="needs a discrete schedule"):
        likelihood.variational_bound(jax.random.key(0), EXACT.denoiser, schedules.vp_linear(), x0)
    with pytest.raises(ValueError, match="same shape"):
        losses.discretized_log_likelihood(x0, x0[:1], jnp.float32(0))
