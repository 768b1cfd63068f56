"""The weightings against the formulas of the papers, in float64, whatever the network predicts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import denoisers, losses, predictions, schedules
from jaxdiff.base import Node

SD = 0.6
# Weight of the error in x0, as the papers have it; s = sigma / alpha.
WEIGHTS = {
    "snr": (losses.snr, lambda s: s**-2),
    "truncated_snr": (losses.truncated_snr, lambda s: np.maximum(s**-2, 1)),
    "snr_plus_one": (losses.snr_plus_one, lambda s: s**-2 + 1),
    "min_snr": (losses.min_snr(5.0), lambda s: np.minimum(s**-2, 5)),
    "p2": (losses.p2(), lambda s: s**-2 / (1 + s**-2)),
    "p2_half": (losses.p2(0.3, 0.5), lambda s: s**-2 / (0.3 + s**-2) ** 0.5),
    "p2_zero": (losses.p2(2.0, 0.0), lambda s: s**-2),
    "sigmoid": (losses.sigmoid(-1.5), lambda s: s**-2 / (1 + np.exp(1.5 - 2 * np.log(s)))),
    "edm": (losses.edm(SD), lambda s: (s**2 + SD**2) / (s * SD) ** 2),
    "flow_matching": (losses.flow_matching, lambda s: (1 / s + 1) ** 2),
}
# |d out / d x0|² of each parameterization, eq. (3) of jaxdiff.predictions, written out.
SLOPES = {
    "x0": lambda a, s: np.ones_like(s),
    "eps": lambda a, s: (a / s) ** 2,
    "v": lambda a, s: ((a**2 + s**2) / s) ** 2,
    "score": lambda a, s: (a / s**2) ** 2,
    "flow": lambda a, s: ((a + s) / s) ** 2,
    "edm": lambda a, s: ((SD * a) ** 2 + s**2) / (SD * s) ** 2,
}


def row(name):
    return predictions.edm(SD) if name == "edm" else getattr(predictions, name)


def nodes(alpha, sigma):
    alpha, sigma = (np.asarray(a, np.float32) for a in (alpha, sigma))
    return Node(jnp.zeros(alpha.shape), jnp.asarray(alpha), jnp.asarray(sigma))


def frames():
    """Variance-preserving, variance-exploding and straight-line nodes."""
    yield schedules.linear().at(jnp.array([0, 200, 500, 999]))
    yield nodes(np.ones(4), [0.002, 0.3, 5.0, 80.0])
    yield nodes([0.999, 0.7, 0.3, 0.01], [0.001, 0.3, 0.7, 0.99])


@pytest.mark.parametrize("output", SLOPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weighting_means_the_same_loss_whatever_the_network_predicts(name, output):
    weighting, formula = WEIGHTS[name]
    for node in frames():
        alpha, sigma = (np.asarray(a, np.float64) for a in (node.alpha, node.sigma))
        expected = formula(sigma / alpha) / SLOPES[output](alpha, sigma)
        np.testing.assert_allclose(weighting(row(output), node), expected, rtol=1e-5)


@pytest.mark.parametrize("output", SLOPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_has_its_limit_at_both_ends(name, output):
    weighting, formula = WEIGHTS[name]
    clean, noise = nodes(1.0, 0.0), nodes(0.0, 1.0)
    for node, alpha, sigma in ((clean, 1.0, 1e-12), (noise, 1e-12, 1.0)):
        limit = formula(np.float64(sigma / alpha)) / SLOPES[output](alpha, np.float64(sigma))
        got = float(weighting(row(output), node))
        assert np.isfinite(got)
        if limit < 1e3:
            np.testing.assert_allclose(got, limit, rtol=1e-5, atol=2e-8)
        else:
            assert got > 1e7


def test_published_forms():
    node = schedules.linear().at(jnp.array([0, 200, 500, 999]))
    ratio = np.asarray(node.alpha, np.float64) ** 2 / np.asarray(node.sigma, np.float64) ** 2
    ones = np.ones(4)
    for output in SLOPES:
        np.testing.assert_array_equal(losses.unit(row(output), node), ones)
    # Hang et al. 2023, table 1: min-SNR for eps and v.
    for output, divisor in (("eps", ratio), ("v", ratio + 1)):
        got = losses.min_snr(5.0)(row(output), node)
        np.testing.assert_allclose(got, np.minimum(ratio, 5) / divisor, rtol=1e-4)
    # Each is the unweighted loss of one output.
    for weighting, output in (
        (losses.snr, "eps"),
        (losses.snr_plus_one, "v"),
        (losses.flow_matching, "flow"),
        (losses.edm(SD), "edm"),
    ):
        np.testing.assert_allclose(weighting(row(output), node), ones, rtol=1e-5)
    # sigmoid(bias - lambda) = exp(bias) / (exp(bias) + SNR).
    np.testing.assert_allclose(
        losses.sigmoid(0.7)(row("v"), node),
        np.exp(0.7) * losses.p2(np.exp(0.7), 1.0)(row("v"), node),
        rtol=1e-5,
    )


def log_snr_slope(schedule, t):
    """d lambda / dt by central differences, in float64."""
    with jax.enable_x64(True):
        t = jnp.asarray(t, jnp.float64)
        low, high = schedule.log_snr(t - 1e-6), schedule.log_snr(t + 1e-6)
    return (np.asarray(high) - np.asarray(low)) / 2e-6


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "rectified_flow", "edm"])
def test_elbo_is_half_the_slope_of_the_log_snr_on_the_noise(name):
    schedule = getattr(schedules, name)()
    t = np.array([0.1, 0.4, 0.9])
    node = schedule.at(jnp.asarray(t, jnp.float32))
    alpha, sigma = (np.asarray(a, np.float64) for a in (node.alpha, node.sigma))
    slope = log_snr_slope(schedule, np.float32(t))
    for output in SLOPES:
        expected = -0.5 * slope * (alpha / sigma) ** 2 / SLOPES[output](alpha, sigma)
        np.testing.assert_allclose(losses.elbo(schedule)(row(output), node), expected, rtol=2e-4)


def test_elbo_has_its_limit_at_both_ends():
    # Rectified flow: -d lambda / dt / 2 = 1 / (t (1 - t)).
    schedule = schedules.rectified_flow()
    weighting = losses.elbo(schedule)
    start, end = schedule.at(0.0), schedule.at(1.0)
    np.testing.assert_allclose(weighting(predictions.flow, end), 0, atol=1e-6)  # (1 - t) / t
    assert 1e6 < weighting(predictions.flow, start) < np.inf
    np.testing.assert_allclose(weighting(predictions.score, start), 0, atol=1e-6)  # t / (1 - t)³
    assert 1e6 < weighting(predictions.eps, start) < np.inf


STD = 0.5  # of Gaussian data, whose bound is known


def exact_network(schedule):
    def apply_fn(params, x, t, cond):
        node = schedule.at(t).over(x)
        return node.sigma * x / ((node.alpha * STD) ** 2 + node.sigma**2)

    return apply_fn


def elbo_loss(params, key, x0):
    schedule = schedules.learned(params)
    loss = losses.denoising_loss(
        exact_network(schedule), schedule, predictions.eps, losses.elbo(schedule)
    )
    return loss(None, key, {"x0": x0})[0]


def test_elbo_of_gaussian_data_depends_on_the_ends_of_the_schedule_only():
    # E|eps error|² = s² SNR / (1 + s² SNR), so that the integral over lambda, halved, is
    # log(1 + s² SNR) / 2 between the ends; and its gradient, through a learned schedule, the
    # integrand at the ends. Means of 5000 examples of 8 coordinates; false alarm 1e-6 in all.
    params = schedules.init_learned(jax.random.key(1), 4, log_snr_min=-3.0, log_snr_max=4.0)
    params = params._replace(rate=3 * params.rate, height=params.height + 4)  # far from a line
    x0 = denoisers.gaussian(np.zeros((8,)), STD).sample(jax.random.key(0), 5000)

    def split(params, key, x0):
        # One example at a time, for the standard error of the gradient.
        return jax.value_and_grad(lambda p: elbo_loss(p, key, x0[None])[0])(params)

    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(2)))(jnp.arange(5000))
    value, grad = jax.jit(jax.vmap(split, (None, 0, 0)))(params, keys, x0)

    def z_score(samples, expected):
        samples = np.asarray(samples, np.float64)
        error = samples.std(axis=0) / np.sqrt(len(samples))
        return np.abs(samples.mean(axis=0) - expected) / error

    high, low = 4.0, -3.0
    gain = lambda l: STD**2 * np.exp(l) / (1 + STD**2 * np.exp(l)) / 2  # noqa: E731, E741
    total = (np.log1p(STD**2 * np.exp(high)) - np.log1p(STD**2 * np.exp(low))) / 2
    assert z_score(value, total) < 5.5
    # l_max moves both ends; span = 7 moves the lower one, through softplus.
    assert z_score(grad.log_snr_max, gain(high) - gain(low)) < 5.5
    assert z_score(grad.span, gain(low) * -np.expm1(-7.0)) < 5.5
    for name in ("height", "rate", "centre"):
        assert np.all(z_score(getattr(grad, name), 0.0) < 5.5), name
        assert np.all(np.asarray(getattr(grad, name)).std(axis=0) > 0), name


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: losses.min_snr(0), "gamma must be positive"),
        (lambda: losses.p2(k=0), "k must be positive"),
        (lambda: losses.p2(gamma=-1), "gamma must not be negative"),
        (lambda: losses.edm(-1), "sigma_data must be positive"),
        (lambda: losses.elbo(schedules.linear()), "elbo needs a continuous schedule"),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_learned_schedule_trains_with_its_network():
    # Noise and network in one gradient: the loss falls and the ends of the log-SNR move.
    data = 0.5 * jax.random.normal(jax.random.key(0), (256, 2))
    optimizer = optax.adam(3e-2)
    params = {
        "schedule": schedules.init_learned(jax.random.key(1), 16, -6.0, 6.0),
        "network": {"slope": jnp.zeros(()), "bias": jnp.zeros(())},
    }

    def apply_fn(params, x, noise_level, cond):
        return (params["slope"] + params["bias"] * noise_level[:, None]) * x

    def mean_loss(params, key):
        schedule = schedules.learned(params["schedule"])
        loss_fn = losses.denoising_loss(apply_fn, schedule, predictions.v, losses.elbo(schedule))
        return jnp.mean(loss_fn(params["network"], key, {"x0": data})[0])

    @jax.jit
    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(mean_loss)(params, key)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), (loss, optax.tree.norm(grads))

    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(2), jnp.arange(150))
    (after, _), (values, norms) = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(norms))
    assert np.mean(values[-20:]) < 0.8 * np.mean(values[:20])
    before, now = (schedules.learned(p["schedule"]) for p in (params, after))
    assert abs(float(now.log_snr(1.0) - before.log_snr(1.0))) > 0.1
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), params, after)
    assert min(jax.tree.leaves(moved)) > 0
