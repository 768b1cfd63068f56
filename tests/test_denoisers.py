"""Exact denoisers against numerical integration, and the adapter of networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxdiff import (
    denoisers,
    grids,
    guidance,
    losses,
    predictions,
    rng,
    sampling,
    schedules,
    solvers,
)
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


def test_a_learned_variance_is_a_fraction():
    schedule, (x0, eps) = schedules.linear(), jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    raw = jnp.linspace(-1, 1, 24).reshape(3, 4, 2)

    def apply_fn(params, x, noise_level, cond):
        target = predictions.v.target(x0, eps, schedule.at(noise_level))
        return jnp.concatenate([target, raw], axis=-1).astype(jnp.bfloat16)

    denoiser = denoisers.from_network(
        apply_fn, None, schedule, predictions.v, learned_variance=True
    )
    node = schedule.at(300)
    prediction = denoiser(diffuse(x0, eps, node), node)
    np.testing.assert_allclose(prediction.x0, x0, atol=0.02)
    np.testing.assert_allclose(prediction.variance, (raw + 1) / 2, atol=0.005)
    assert prediction.variance.dtype == jnp.float32
    with pytest.raises(ValueError, match="must have 2 output channels"):
        denoiser(x0[..., :1], node)


def test_a_self_conditioned_denoiser_shows_the_prediction_to_the_network():
    seen = {}

    def apply_fn(params, x, noise_level, cond):
        seen["x"] = x
        return x[..., :2] + 3 * x[..., 2:]

    schedule = schedules.linear()
    denoiser = denoisers.from_network(apply_fn, None, schedule, predictions.x0, self_condition=True)
    x, x0_prev = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    node = schedule.at(9)
    np.testing.assert_allclose(denoiser(x, node).x0, x)
    np.testing.assert_array_equal(seen["x"][..., 2:], 0)
    np.testing.assert_allclose(denoiser(x, node, x0_prev).x0, x + 3 * x0_prev, rtol=1e-6)
    np.testing.assert_array_equal(seen["x"], jnp.concatenate([x, x0_prev], axis=-1))
    # In a sampler: x0 = x + 3 x0_prev, and ddim from sigma to clean ends at the last of them.
    grid = grids.from_timesteps(schedule, [900, 500])
    solver = solvers.self_conditioned(solvers.ddim())
    got, _ = sampling.walk(jax.random.split(jax.random.key(0), 3), denoiser, solver, grid, x)
    a, s = (np.asarray(f, np.float64) for f in (grid.alpha, grid.sigma))
    middle = a[1] * x + s[1] * (x - a[0] * x) / s[0]
    np.testing.assert_allclose(got, middle + 3 * np.asarray(x), rtol=1e-4, atol=1e-4)


def linear_network(params, x, noise_level, cond):
    level = noise_level.reshape(noise_level.shape + (1,) * (x.ndim - 1))
    return params["a"] * x + params["b"] * level


@pytest.mark.parametrize("name", ["edm", "vp_cosine", "rectified_flow"])
def test_preconditioning_is_that_of_edm(name):
    # D(x; s) = c_skip x + c_out F(c_in x; c_noise) at s = sigma / alpha and x / alpha (Karras et
    # al. 2022, table 1), in float64.
    schedule, sd, params = getattr(schedules, name)(), 0.6, {"a": 1.3, "b": -0.4}
    denoiser = denoisers.from_network(
        denoisers.preconditioned(linear_network, schedule, sd), params, schedule,
        predictions.edm(sd),
    )  # fmt: skip
    t = jnp.array([0.05, 0.4, 0.95])
    node, x = schedule.at(t), jax.random.normal(jax.random.key(0), (3, 5, 2))
    x = x * jnp.sqrt((sd * node.over(x).alpha) ** 2 + node.over(x).sigma ** 2)
    alpha, sigma, y = (np.asarray(f, np.float64) for f in (node.alpha, node.sigma, x))
    alpha, sigma = alpha[:, None, None], sigma[:, None, None]
    s, y = sigma / alpha, y / alpha
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / np.sqrt(s**2 + sd**2)
    network = 1.3 * y / np.sqrt(s**2 + sd**2) - 0.4 * np.log(s) / 4
    expected = c_skip * y + c_out * network
    np.testing.assert_allclose(denoiser(x, node).x0, expected, rtol=1e-4, atol=1e-5)


def test_preconditioned_input_has_unit_variance_between_indices_too():
    schedule, sd = schedules.linear(), 0.6
    network = denoisers.preconditioned(lambda p, x, level, cond: (x, level), schedule, sd)
    x = jnp.ones((4, 2))
    t = jnp.array([0, 250, 700, 999])
    node = schedule.at(t)
    scaled, level = network(None, x, t, None)
    variance = (sd * np.asarray(node.alpha)) ** 2 + np.asarray(node.sigma) ** 2
    np.testing.assert_allclose(scaled, np.stack(2 * [variance**-0.5], axis=1), rtol=1e-4)
    np.testing.assert_allclose(level, -np.asarray(node.log_snr) / 8, rtol=1e-4)
    # A float t is that of schedule.time: the network is told the level of the sampler's node.
    for log_snr in (-6.0, -0.3, 7.0):
        between = jnp.full((4,), schedule.time(log_snr))
        assert between.dtype == jnp.float32
        scaled, level = network(None, x, between, None)
        np.testing.assert_allclose(level, np.full(4, -log_snr / 8), rtol=1e-3)
        alpha2 = 1 / (1 + np.exp(-log_snr))
        expected = 1 / np.sqrt(sd**2 * alpha2 + 1 - alpha2)
        np.testing.assert_allclose(scaled, np.full((4, 2), expected), rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (schedules.rectified_flow(), jnp.array([0.0, 1.0])),
        (schedules.from_alphas_bar([0.99, 0.5, 0.0]), jnp.array([-1, 2])),
    ],
)
def test_preconditioning_is_finite_at_both_ends(schedule, ends):
    network = denoisers.preconditioned(linear_network, schedule)
    out = network({"a": 1.0, "b": 1.0}, jnp.ones((2, 3)), ends, None)
    assert np.isfinite(out).all()


def test_preconditioning_hands_on_keys_and_conditions():
    schedule = schedules.linear()

    def apply_fn(params, x, level, cond, dropout_keys):
        return params * x + cond + rng.uniform(dropout_keys)[:, None]

    loss = losses.denoising_loss(
        denoisers.preconditioned(apply_fn, schedule), schedule, predictions.edm(), losses.edm(),
        dropout=True,
    )  # fmt: skip
    x0 = jnp.ones((2, 3))
    one, two = (loss(1.0, jax.random.key(0), {"x0": x0, "cond": c})[0] for c in (x0, 2 * x0))
    assert np.all(one != two)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        denoisers.preconditioned(linear_network, schedule, 0.0)


def test_at_any_scale_asks_on_the_scale_of_the_denoiser():
    # An exact denoiser knows any scale; one that is told only t knows its own.
    schedule = schedules.vp_cosine()

    def own_scale(x, node, *args):
        return mixture.denoiser(x, schedule.at(node.t))._replace(variance=args)

    denoiser = denoisers.at_any_scale(own_scale)
    x = jnp.array([[-4.0], [0.3], [6.0]])
    for sigma in (jnp.float32(0.7), jnp.array([0.05, 1.0, 20.0])):
        node = Node(schedule.time(-2 * jnp.log(sigma)), jnp.ones_like(sigma), sigma)
        noisy = x + node.over(x).sigma * 0.5
        np.testing.assert_allclose(
            denoiser(noisy, node).x0, mixture.denoiser(noisy, node).x0, rtol=1e-3, atol=1e-3
        )
        assert denoiser(noisy, node, "prev").variance == ("prev",)


def test_clip_x0_clips_and_keeps_the_rest():
    inner = lambda x, node: Prediction(x * 3, variance=x)  # noqa: E731
    x = jnp.array([[-0.9, 0.1, 0.9]])
    prediction = guidance.clip_x0(inner)(x, None)
    np.testing.assert_allclose(prediction.x0, [[-1, 0.3, 1]], rtol=1e-6)
    assert prediction.variance is x
    np.testing.assert_allclose(guidance.clip_x0(inner, 0, 0.5)(x, None).x0, [[0, 0.3, 0.5]])
    with pytest.raises(ValueError, match="low must be less than high"):
        guidance.clip_x0(inner, 1, -1)
