"""The probability flow's likelihood against closed forms, in float64 where they are computed."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxdiff import denoisers, likelihood, schedules
from jaxdiff.base import Prediction

WEIGHTS = np.array([0.3, 0.5, 0.2])
MEANS = np.array([[-0.6, 0.3, 0.2, 0.0], [0.4, -0.2, 0.1, 0.1], [-0.1, 0.05, -0.55, -0.25]])
STDS = np.array([0.15, 0.25, 0.1])
MIXTURE = denoisers.gaussian_mixture(WEIGHTS, MEANS, STDS)


def log_density(x, alpha=1.0, sigma=0.0):
    """log p(x) of the model whose samples are alpha x0 + sigma eps, divided by alpha."""
    x = np.asarray(x, np.float64)[:, None]
    std = np.sqrt(STDS**2 + (sigma / alpha) ** 2)[:, None]
    return special.logsumexp(np.log(WEIGHTS) + stats.norm.logpdf(x, MEANS, std).sum(-1), axis=1)


def flow(schedule, denoiser=MIXTURE.denoiser, key=0, **kwargs):
    return jax.jit(
        lambda x, **arrays: likelihood.probability_flow(
            jax.random.key(key), denoiser, schedule, x, **kwargs, **arrays
        )
    )


@pytest.mark.parametrize(
    "schedule", [schedules.rectified_flow(), schedules.linear(1000)], ids=["flow", "linear"]
)
def test_the_log_density_of_a_mixture_is_exact(schedule):
    x = jnp.concatenate([MIXTURE.sample(jax.random.key(0), 24), jnp.full((1, 4), 1.2)])
    found = flow(schedule)(x)
    first = schedule.at(0 if schedule.num_steps else 0.0)
    expected = log_density(x, float(first.alpha), float(first.sigma))
    # Nats a dimension; the prior's own error, in which alpha at the end is taken for 0, is in it.
    # The last is far out, at -39 nats.
    error = np.abs(found.log_density - expected) / 4
    assert error[:-1].max() < 2e-4
    assert error[-1] < 1e-3
    np.testing.assert_array_equal(found.error, 0)
    assert found.evaluations.dtype == jnp.int32
    assert 30 < found.evaluations.min() < found.evaluations.max() < 400


def test_gaussian_data_become_their_own_latents_and_a_start_costs_what_is_said():
    # At Gauss-Hermite nodes of N(mean, std²), so that means over the data are exact.
    mean, std, start = 0.3, 0.5, 0.1
    exact, schedule = denoisers.gaussian([mean], [std]), schedules.vp_cosine()
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    x = jnp.asarray(mean + std * nodes[:, None], jnp.float32)
    found = flow(schedule, exact.denoiser, start=start)(x)
    node = schedule.at(start)
    ratio = float(node.sigma / node.alpha / std) ** 2
    wide = std * np.sqrt(1 + ratio)
    np.testing.assert_allclose(found.latents[:, 0], nodes * std / wide, atol=2e-4)
    true = stats.norm.logpdf(np.asarray(x[:, 0], float), mean, std)
    blurred = stats.norm.logpdf(np.asarray(x[:, 0], float), mean, wide)
    np.testing.assert_allclose(found.log_density, blurred, atol=1e-3)
    cost = weights @ (true - found.log_density) / weights.sum()
    np.testing.assert_allclose(cost, ratio**2 / 4, rtol=0.2)


def test_hutchinson_has_no_bias_and_knows_its_error():
    # 400 examples, whose Jacobians are far from diagonal; two z-scores, false alarm of each 4e-8.
    x = MIXTURE.sample(jax.random.key(2), 400)
    schedule = schedules.rectified_flow()
    found = flow(schedule, trace="hutchinson", num_probes=4, rtol=1e-4, atol=1e-4)(x)
    off = np.asarray(found.log_density, np.float64) - log_density(x)
    assert np.abs(off).mean() > 0.05  # or the prior's and the solver's error would count
    assert abs(off.mean()) < 5.5 * off.std() / 20
    excess = off**2 - np.asarray(found.error, np.float64) ** 2
    assert abs(excess.mean()) < 5.5 * excess.std() / 20


def test_directions_are_by_address_and_neighbours_do_not_count():
    run = flow(schedules.vp_linear(), trace="hutchinson")
    x = MIXTURE.sample(jax.random.key(1), 4)
    whole = run(x, index=jnp.arange(4))
    assert np.isnan(whole.error).all()
    turned = run(x[::-1], index=jnp.arange(4)[::-1])
    np.testing.assert_allclose(turned.log_density[::-1], whole.log_density, rtol=1e-4)
    alone = run(x.at[1:].set(30.0), index=jnp.array([0, 11, 12, 13]))
    np.testing.assert_allclose(alone.log_density[0], whole.log_density[0], rtol=1e-4)
    np.testing.assert_allclose(alone.latents[0], whole.latents[0], atol=1e-4)
    assert alone.evaluations[0] == whole.evaluations[0] != alone.evaluations[1]
    other = run(x, index=4 + jnp.arange(4))
    assert np.all(np.abs(other.log_density - whole.log_density) > 1e-3)


def test_only_what_counts_has_a_density():
    # The Jacobian is diagonal: directions of signs are exact, as normal ones would not be.
    mean, std = np.zeros(3), np.array([0.3, 0.2, 0.5])
    exact = denoisers.gaussian(mean, std)
    mask = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 1]])
    x = exact.sample(jax.random.key(1), 3)
    expected = (stats.norm.logpdf(np.asarray(x, float), mean, std) * mask).sum(1)

    def denoiser(x, node):
        # What is not data is shown as zeros, and what is said of it does not count.
        prediction = exact.denoiser(x, node).x0
        return Prediction(jnp.where(mask > 0, prediction, 7.0 + x), evaluations=3)

    run = flow(schedules.edm(), denoiser, mask=mask, trace="hutchinson", num_probes=2)
    found = run(jnp.where(mask > 0, x, jnp.nan))
    np.testing.assert_allclose(found.log_density, expected, atol=1e-3)
    np.testing.assert_allclose(found.error, 0, atol=1e-4)
    np.testing.assert_array_equal(found.latents[mask == 0], 0)
    np.testing.assert_array_equal(found.evaluations % 3, 0)


def test_bad_arguments_are_refused(monkeypatch):
    x = jnp.zeros((2, 4))

    def call(x=x, schedule=schedules.vp_linear(), **kwargs):  # noqa: B008
        return likelihood.probability_flow(
            jax.random.key(0), MIXTURE.denoiser, schedule, x, **kwargs
        )

    for kwargs, match in (
        ({"trace": "guess"}, 'trace must be "exact" or "hutchinson"'),
        ({"trace": "hutchinson", "num_probes": 0}, "num_probes must be at least 1"),
        ({"num_probes": 2}, 'num_probes is for trace="hutchinson"'),
        ({"rtol": 0.0}, "rtol and atol must be positive"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"start": 1.0}, "start must lie before the schedule's end"),
        ({"start": 1.5}, r"t must lie in \[0, 1\]"),
        ({"mask": jnp.ones((3, 3))}, "mask must broadcast"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**kwargs)
    with pytest.raises(TypeError, match="t must be an integer index"):
        call(schedule=schedules.linear(10), start=0.5)
    with pytest.raises(TypeError, match="must be floating"):
        call(jnp.zeros((2, 4), jnp.uint8))
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"likelihood\.probability_flow needs.*jaxdiff\[ode\]"):
        call()
