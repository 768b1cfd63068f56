"""Exact denoisers against numerical integration, and the adapter of networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxdiff import denoisers, guidance, predictions, schedules
from jaxdiff.base import Node, Prediction
from jaxdiff.process import diffuse

WEIGHTS, MEANS, STDS = [0.5, 0.3, 0.2], [0.0, 5.0, -3.0], [1.0, 0.5, 1.5]
mixture = denoisers.gaussian_mixture(WEIGHTS, np.array(MEANS)[:, None], STDS)


def prior(x0):
    return sum(w * stats.norm.pdf(x0, m, s) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))


@pytest.mark.parametrize(("alpha", "sigma"), [(0.999, 0.05), (0.8, 0.6), (0.1, 0.99), (1.0, 3.0)])
def test_mixture_is_bayes_rule(alpha, sigma):
    # E[x0 | x] and p(x) by quadrature over x0, in float64.
    node = Node(jnp.int32(0), jnp.float32(alpha), jnp.float32(sigma))
    x = np.array([-4.0, -1.0, 0.3, 2.5, 6.0])
    grid = np.linspace(-12, 12, 48_001)
    joint = prior(grid) * stats.norm.pdf(x[:, None], alpha * grid, sigma)
    density = integrate.simpson(joint, x=grid)
    expected = integrate.simpson(joint * grid, x=grid) / density
    got = jnp.asarray(x, jnp.float32)[:, None]
    np.testing.assert_allclose(mixture.denoiser(got, node).x0[:, 0], expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(
        mixture.log_density(got, node), np.log(density), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("t", [0, 300, 999])
def test_score_is_the_gradient_of_the_log_density_and_tweedie_holds(t):
    exact = denoisers.gaussian_mixture(
        [0.3, 0.7], np.arange(12.0).reshape(2, 3, 2) / 12, np.array([0.3, 0.6])
    )
    node = schedules.linear().at(t)
    x = jax.random.normal(jax.random.key(0), (4, 3, 2))
    gradient = jax.grad(lambda x: exact.log_density(x, node).sum())(x)
    score = exact.score(x, node)
    np.testing.assert_allclose(score, gradient, rtol=1e-4, atol=1e-4)
    # Tweedie's formula: x0 = (x + sigma² score) / alpha.
    tweedie = (x + node.sigma**2 * score) / node.alpha
    np.testing.assert_allclose(exact.denoiser(x, node).x0, tweedie, atol=3e-6 / float(node.alpha))


def test_gaussian_is_a_mixture_of_one_with_a_std_per_coordinate():
    mean, std = np.array([[1.0, -2.0]]), np.array([[0.5, 2.0]])
    exact = denoisers.gaussian(mean, std)
    node = Node(jnp.int32(0), jnp.float32(0.6), jnp.float32(0.8))
    x = np.array([[[0.3, 0.4]]])
    gain = 0.6 * std**2 / (0.36 * std**2 + 0.64)
    np.testing.assert_allclose(
        exact.denoiser(jnp.asarray(x, jnp.float32), node).x0,
        mean + gain * (x - 0.6 * mean), rtol=1e-5,
    )  # fmt: skip
    expected = stats.norm.logpdf(x, 0.6 * mean, np.sqrt(0.36 * std**2 + 0.64)).sum()
    np.testing.assert_allclose(
        exact.log_density(jnp.asarray(x, jnp.float32), node), [expected], rtol=1e-5
    )


def test_point_mass_and_clean_nodes_are_finite():
    point = denoisers.point_mass(np.array([0.5, -0.5]))
    clean = Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))
    x = jax.random.normal(jax.random.key(0), (3, 2))
    for node in (clean, schedules.linear().at(0), schedules.linear().at(999)):
        np.testing.assert_array_equal(
            point.denoiser(x, node).x0, np.broadcast_to(np.float32([0.5, -0.5]), (3, 2))
        )
    y = jnp.asarray([[0.2], [4.0]])
    np.testing.assert_allclose(mixture.denoiser(y, clean).x0, y, rtol=1e-6)
    np.testing.assert_allclose(mixture.log_density(y, clean), np.log(prior(y))[:, 0], rtol=1e-5)


def test_samples_have_the_distribution_and_are_addressed():
    # False alarm 1e-6.
    x = mixture.sample(jax.random.key(0), 50_000)
    cdf = lambda v: sum(  # noqa: E731
        w * stats.norm.cdf(v, m, s) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
    )
    assert stats.kstest(np.asarray(x)[:, 0], cdf).pvalue > 1e-6
    np.testing.assert_array_equal(mixture.sample(jax.random.key(0), 10), x[:10])


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (([0.5], [[0.0], [1.0]], [1.0, 1.0]), "means"),
        (([0.5, 0.5], [[0.0], [1.0]], [1.0]), "stds must have shape"),
        (([0.5, 0.6], [[0.0], [1.0]], [1.0, 1.0]), "sum to one"),
        (([1.5, -0.5], [[0.0], [1.0]], [1.0, 1.0]), "positive"),
        (([0.5, 0.5], [[0.0], [1.0]], [1.0, -1.0]), "not be negative"),
    ],
)
def test_bad_mixtures_are_refused(args, match):
    with pytest.raises(ValueError, match=match):
        denoisers.gaussian_mixture(*args)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(B, "):
        mixture.denoiser(jnp.zeros((3, 2)), schedules.linear().at(0))


@pytest.mark.parametrize("name", ["x0", "eps", "v", "score", "flow"])
def test_from_network_undoes_the_parameterization(name):
    # A network that knows the answer: the denoiser must return the clean data.
    schedule, row = schedules.cosine(), getattr(predictions, name)
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    seen = {}

    def apply_fn(params, x, noise_level, cond):
        seen.update(params=params, noise_level=noise_level, cond=cond)
        return row.target(x0, eps, schedule.at(noise_level))

    cond = jnp.array([1, 2, 3])
    denoiser = denoisers.from_network(apply_fn, {"w": 1}, schedule, row, cond)
    for t in (5, jnp.array([5, 300, 900])):
        node = schedule.at(t)
        prediction = denoiser(diffuse(x0, eps, node), node)
        np.testing.assert_allclose(prediction.x0, x0, atol=1e-3)
        assert seen["params"] == {"w": 1}
        assert seen["cond"] is cond
        np.testing.assert_array_equal(seen["noise_level"], np.broadcast_to(t, 3))


def test_from_network_keeps_the_state_in_float32():
    denoiser = denoisers.from_network(
        lambda params, x, noise_level, cond: x.astype(jnp.bfloat16),
        None, schedules.linear(), predictions.v,
    )  # fmt: skip
    x = jnp.ones((2, 4, 4, 1))
    assert denoiser(x, schedules.linear().at(3)).x0.dtype == jnp.float32


def test_zero_terminal_snr_is_refused_for_eps():
    schedule = schedules.from_alphas_bar([0.5, 0.0])
    with pytest.raises(ValueError, match="singular on a schedule that ends at zero"):
        denoisers.from_network(lambda *args: None, None, schedule, predictions.eps)
    denoisers.from_network(lambda *args: None, None, schedule, predictions.v)


def test_clip_x0_clips_and_keeps_the_rest():
    inner = lambda x, node: Prediction(x * 3, variance=x)  # noqa: E731
    x = jnp.array([[-0.9, 0.1, 0.9]])
    prediction = guidance.clip_x0(inner)(x, None)
    np.testing.assert_allclose(prediction.x0, [[-1, 0.3, 1]], rtol=1e-6)
    assert prediction.variance is x
    np.testing.assert_allclose(guidance.clip_x0(inner, 0, 0.5)(x, None).x0, [[0, 0.3, 0.5]])
    with pytest.raises(ValueError, match="low must be less than high"):
        guidance.clip_x0(inner, 1, -1)
