"""The bound in continuous time against closed forms, and as the limit of the bound in steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from jaxdiff import denoisers, likelihood, schedules
from jaxdiff.base import Prediction

STD = 0.15
EXACT = denoisers.gaussian(np.zeros((8,)), STD)


def on_levels(x0):
    return jnp.round(x0 * 127.5 + 127.5) / 127.5 - 1


def closed_form(first, last):
    """Prior, diffusion and reconstruction in bits, from log-SNR `first` to `last`, in float64."""
    alpha2, sigma2 = special.expit(last), special.expit(-last)
    prior = 0.5 * (alpha2 * STD**2 + sigma2 - 1 - np.log(sigma2))
    # Half the integral of SNR s² / (1 + SNR s²).
    diffusion = 0.5 * (np.log1p(STD**2 * np.exp(first)) - np.log1p(STD**2 * np.exp(last)))
    eps, weights = np.polynomial.hermite_e.hermegauss(60)
    bins = 2 / 255 * np.arange(-255, 256)[:, None] * np.exp(first / 2)
    log_p = -0.5 * eps**2 - special.logsumexp(-0.5 * (bins - eps) ** 2, axis=0)
    return tuple(a / np.log(2) for a in (prior, diffusion, -weights @ log_p / weights.sum()))


def bound(schedule, denoiser=EXACT.denoiser, key=0, **kwargs):
    return jax.jit(
        lambda x0, **arrays: likelihood.continuous_bound(
            jax.random.key(key), denoiser, schedule, x0, **kwargs, **arrays
        )
    )


def z_score(samples, expected):
    samples = np.asarray(samples, np.float64)
    return abs(samples.mean() - expected) / (samples.std() / np.sqrt(samples.size))


LEARNED = schedules.learned(schedules.init_learned(jax.random.key(0), 8, -6.0, 9.0))


@pytest.mark.parametrize(
    ("schedule", "first", "last", "options"),
    [  # the schedule's ends, or those asked for
        (schedules.vp_cosine(), 11.0, -7.0, {"sampling": "time", "num_points": 200}),
        (LEARNED, 9.0, -6.0, {"sampling": "time", "points": "grid"}),
        (schedules.ve(0.01, 50.0), 9.21034, -7.0, {"points": "grid"}),
        (schedules.linear(1000), 9.21024, -7.0, {"points": "grid", "num_points": 64}),
    ],
    ids=["cosine", "learned", "ve", "linear"],
)
def test_each_term_of_gaussian_data_has_its_closed_form(schedule, first, last, options):
    # Means over 600 examples. z-scores: 12, false alarm of each 4e-8.
    options = {"log_snr_min": -7.0, "log_snr_max": 11.0} | options
    x0 = on_levels(EXACT.sample(jax.random.key(1), 600))
    bits, terms = bound(schedule, **options)(x0)
    prior, diffusion, reconstruction = closed_form(first, last)
    np.testing.assert_allclose(
        bits, terms.prior + terms.diffusion + terms.reconstruction, rtol=1e-5
    )
    assert z_score(terms.prior, prior) < 5.5
    assert z_score(terms.diffusion, diffusion) < 5.5
    assert z_score(terms.reconstruction, reconstruction) < 5.5
    np.testing.assert_allclose(terms.points.mean(0), terms.diffusion, rtol=1e-5)
    assert terms.log_snr.max() <= first + 1e-3
    assert terms.log_snr.min() >= last - 1e-3


def test_the_bound_is_the_entropy_of_the_levels():
    # With noise as wide as half a bin at its start, and nothing of the data left at its end.
    levels = np.arange(-255, 256, 2) / 255
    p = stats.norm.cdf(levels + 1 / 255, 0, STD) - stats.norm.cdf(levels - 1 / 255, 0, STD)
    prior, diffusion, reconstruction = closed_form(11.0, -15.0)
    assert 0 < prior + diffusion + reconstruction + np.sum(p * np.log2(p)) < 0.002


def test_the_error_is_that_of_the_draws():
    # One example 1000 times: what differs are draws. Low discrepancy takes out what the points
    # have in common.
    x0 = jnp.broadcast_to(EXACT.sample(jax.random.key(1), 1), (1000, 8))
    _, terms = bound(schedules.rectified_flow(), num_points=16)(x0)
    np.testing.assert_allclose(np.sqrt(np.mean(terms.error**2)), np.std(terms.diffusion), rtol=0.12)


WEIGHTS, MEANS, STDS = np.array([0.4, 0.6]), np.array([-0.5, 0.25]), np.array([0.05, 0.15])
MIXTURE = denoisers.gaussian_mixture(WEIGHTS, MEANS[:, None], STDS)


def mean_square(log_snr):
    """E|x0 - E[x0 | x]|² of the mixture at each log-SNR, by quadrature in float64."""
    noise = np.exp(-log_snr)[:, None, None, None]  # axes: log-SNR, drawn component, y, component
    grid = np.linspace(-9, 9, 181)
    width = np.sqrt(STDS**2 + noise[..., 0])
    y = (MEANS + grid[:, None] * width).transpose(0, 2, 1)[..., None]
    log_r = np.log(WEIGHTS) + stats.norm.logpdf(y, MEANS, np.sqrt(STDS**2 + noise))
    r = np.exp(log_r - special.logsumexp(log_r, axis=-1, keepdims=True))
    mean = (MEANS * noise + STDS**2 * y) / (STDS**2 + noise)
    second = STDS**2 * noise / (STDS**2 + noise) + mean**2
    variance = (r * second).sum(-1) - (r * mean).sum(-1) ** 2
    return integrate.simpson(variance * stats.norm.pdf(grid), x=grid, axis=-1) @ WEIGHTS


def steps_of(num_steps):
    """Bits of T - 1 steps of equal log-SNR from 7 to -10 (Kingma et al. 2021, eq. 13)."""
    log_snr = np.linspace(7, -10, num_steps)
    return 0.5 * np.sum(-np.diff(np.exp(log_snr)) * mean_square(log_snr)[1:]) / np.log(2)


def test_steps_cost_more_than_the_flow_by_one_over_their_number():
    # A sum of rectangles under a falling curve: what T steps cost beyond the integral is
    # h/4 int SNR |d mse / dl| dl + O(h²), h = 17 / (T - 1). Four z-scores, false alarm 4e-8 each.
    log_snr = np.linspace(7, -10, 801)
    curve = mean_square(log_snr)
    limit = -0.5 * integrate.simpson(np.exp(log_snr) * curve, x=log_snr) / np.log(2)
    slope = np.abs(np.gradient(curve, log_snr))
    rate = -integrate.simpson(np.exp(log_snr) * slope, x=log_snr) / 4 / np.log(2)
    for num_steps in (17, 65, 257):
        h = 17 / (num_steps - 1)
        np.testing.assert_allclose((steps_of(num_steps) - limit) / h, rate, rtol=0.45 * h)

    x0 = on_levels(MIXTURE.sample(jax.random.key(1), 10_000))
    _, terms = bound(
        schedules.vp_cosine(), MIXTURE.denoiser, log_snr_max=7.0, log_snr_min=-10.0, num_points=64
    )(x0)
    assert z_score(terms.diffusion, limit) < 5.5
    gaps = []
    flow = jax.jit(
        lambda x: (
            likelihood.probability_flow(
                jax.random.key(0), MIXTURE.denoiser, schedules.vp_cosine(), x, rtol=1e-4, atol=1e-4
            ).log_density
        )
    )(x0)
    for num_steps in (17, 65):
        chain = schedules.from_alphas_bar(special.expit(np.linspace(7, -10, num_steps)))
        bits, terms = jax.jit(
            lambda x0, chain=chain: likelihood.variational_bound(
                jax.random.key(0), MIXTURE.denoiser, chain, x0
            )
        )(x0)
        assert z_score(terms.steps.sum(0), steps_of(num_steps)) < 5.5
        gaps.append(np.asarray(bits, float) + np.asarray(flow, float) / np.log(2) - np.log2(127.5))
    for gap in (gaps[1], gaps[0] - gaps[1]):
        assert gap.mean() > 5.5 * gap.std() / 100


def test_a_draw_is_by_address_and_masks_count():
    run = bound(schedules.rectified_flow(), num_points=4)
    x0 = on_levels(EXACT.sample(jax.random.key(1), 6))
    whole, _ = run(x0, index=jnp.arange(6))
    turned, _ = run(x0[::-1], index=jnp.arange(6)[::-1])
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-5)
    mask = jnp.arange(8) < 4
    left, _ = run(jnp.where(mask, x0, jnp.nan), mask=mask, index=jnp.arange(6))
    right, _ = run(x0, mask=~mask, index=jnp.arange(6))
    np.testing.assert_allclose((left + right) / 2, whole, rtol=1e-5)
    assert np.all(np.abs(left - right) > 1e-4)


def test_bad_arguments_are_refused():
    x0 = jnp.zeros((2, 8))

    def call(x0=x0, schedule=LEARNED, **kwargs):
        return likelihood.continuous_bound(
            jax.random.key(0), lambda x, node: Prediction(x), schedule, x0, **kwargs
        )

    for kwargs, match in (
        ({"num_points": 0}, "num_points must be at least 1"),
        ({"num_levels": 1}, "num_levels must be at least 2"),
        ({"points": "random"}, 'points must be "low_discrepancy" or "grid"'),
        ({"sampling": "uniform"}, 'sampling must be "log_snr" or "time"'),
        ({"sampling": "time", "schedule": schedules.linear(10)}, "needs a continuous schedule"),
        ({"log_snr_max": -8.0}, "must have log-SNRs between"),
        ({"mask": jnp.ones((3, 3))}, "mask must broadcast"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**kwargs)
    with pytest.raises(TypeError, match="x0 must be floating"):
        call(jnp.zeros((2, 8), jnp.uint8))
