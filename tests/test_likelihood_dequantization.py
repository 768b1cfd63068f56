"""Dequantization against discrete distributions that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import denoisers, likelihood, rng
from jaxdiff.base import Node

CLEAN = Node(jnp.float32(0), jnp.float32(1), jnp.float32(0))
LEVELS = 8
# A model whose density within the bins is far from flat: v = k + u is N(CENTRE, WIDTH²).
CENTRE, WIDTH = 3.3, 0.9
EDGES = {"levels": (0.5, LEVELS - 1), "interval": (0.0, LEVELS)}


def log_density(placement):
    """log p_x of the model, where x = (v - shift) 2/n - 1 in each coordinate."""
    shift, n = EDGES[placement]
    exact = denoisers.gaussian(np.full(2, (CENTRE - shift) * 2 / n - 1), WIDTH * 2 / n)
    return lambda x: exact.log_density(x, CLEAN)


def log_p(k):
    """log P of the level k: the mass of its bin."""
    upper, lower = (stats.norm.cdf(k + edge, CENTRE, WIDTH) for edge in (1, 0))
    return np.log(upper - lower)


def draw(num):
    """Levels as the model has them, and their x0, `(num, 2)`."""
    v = CENTRE + WIDTH * np.random.default_rng(0).standard_normal((num, 2))
    k = np.clip(np.floor(v), 0, LEVELS - 1)
    return k, jnp.asarray(2 * k / (LEVELS - 1) - 1, jnp.float32)


def bits(x0, noise=likelihood.uniform, placement="levels", density=None, **kwargs):
    density = log_density(placement) if density is None else density
    return jax.jit(
        lambda x0: likelihood.dequantized_bits(
            jax.random.key(0), density, x0, noise, num_levels=LEVELS, placement=placement, **kwargs
        )
    )(x0)


@pytest.mark.parametrize("placement", ["levels", "interval"])
def test_the_model_s_own_noise_leaves_nothing(placement):
    # q(u|k) = p(u|k), a cut normal: every single draw is -log P(k), eq. (1) with equality.
    k, x0 = draw(200)

    def mean(x0):
        return CENTRE - jnp.round((x0 + 1) * (LEVELS - 1) / 2)

    got, log_weights = bits(x0, likelihood.truncated_normal(WIDTH, mean), placement)
    assert got.shape == (200,)
    assert log_weights.shape == (1, 200)
    np.testing.assert_allclose(got, -log_p(k).sum(1) / (2 * np.log(2)), atol=1e-4)


def test_uniform_noise_costs_its_divergence_and_more_draws_less():
    # 3000 examples of 64 draws. Four z-scores, false alarm of each 4e-8.
    k, x0 = draw(3000)
    got, log_weights = bits(x0, num_draws=64)
    true = -log_p(k).sum(1)
    log_weights = np.asarray(log_weights, np.float64)

    def nats(count):
        return -np.asarray(likelihood.importance_weighted(log_weights[:count]), np.float64)

    np.testing.assert_allclose(got, nats(64) / (2 * np.log(2)), rtol=1e-5)
    u = (np.arange(1000) + 0.5) / 1000
    cost = (log_p(k) - stats.norm.logpdf(k[..., None] + u, CENTRE, WIDTH).mean(-1)).sum(1)
    excess = nats(1) - true - cost
    assert abs(excess.mean()) < 5.5 * excess.std() / np.sqrt(3000)
    assert cost.mean() > 0.1
    gaps = [nats(count) - true for count in (1, 4, 64)]
    for more, fewer in zip(gaps[1:], gaps, strict=False):
        gain = fewer - more
        assert gain.mean() > 5.5 * gain.std() / np.sqrt(3000)
    # Of many draws Var(w) / (2 K) is left.
    last = gaps[-1]
    assert -5.5 * last.std() / np.sqrt(3000) < last.mean() < 0.01


def test_narrow_noise_beats_uniform_for_a_model_of_levels():
    # What a model of levels is at the flow's start: a peak of 0.15 bins at each. -log P in bits is
    # the entropy; false alarm 4e-8.
    p = np.array([0.3, 0.05, 0.05, 0.1, 0.2, 0.2, 0.05, 0.05])
    width = 2 / (LEVELS - 1)
    exact = denoisers.gaussian_mixture(
        p, np.linspace(-1, 1, LEVELS)[:, None], np.full(8, 0.15 * width)
    )
    k = np.random.default_rng(1).choice(LEVELS, (2000, 1), p=p)
    x0 = jnp.asarray(2 * k / (LEVELS - 1) - 1, jnp.float32)

    def measured(noise):
        return bits(x0, noise, density=lambda x: exact.log_density(x, CLEAN))[0]

    true = -np.log2(p[k[:, 0]])
    narrow = np.asarray(measured(likelihood.truncated_normal(0.15)), np.float64)
    assert abs((narrow - true).mean()) < 0.003 + 5.5 * (narrow - true).std() / np.sqrt(2000)
    close = measured(likelihood.logit_normal(0.0, 0.5))
    assert np.mean(close - narrow) > 0.03
    assert np.mean(measured(likelihood.uniform) - close) > 0.5


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "truncated_normal", "off"])
def test_noises_are_what_they_say(name):
    # The log-density against SciPy in float64, and the draws by it: false alarm 1e-6 each.
    noise, u_of = {
        "uniform": (likelihood.uniform, stats.uniform()),
        "logit_normal": (likelihood.logit_normal(0.4, 1.2), None),
        "truncated_normal": (likelihood.truncated_normal(0.3), stats.truncnorm(-5 / 3, 5 / 3)),
        "off": (likelihood.truncated_normal(0.5, -0.6), stats.truncnorm(1.2, 3.2)),
    }[name]
    x0 = jnp.zeros((2000, 3))
    keys = rng.per_example(jax.random.key(3), jnp.arange(2000))
    u, log_q = (np.asarray(a, np.float64) for a in jax.jit(noise)(keys, x0))
    assert u.min() >= 0
    assert u.max() < 1
    if name == "logit_normal":
        logit = np.log(u) - np.log1p(-u)
        expected = stats.norm.logpdf(logit, 0.4, 1.2) - np.log(u) - np.log1p(-u)
        assert stats.kstest(logit.ravel(), stats.norm(0.4, 1.2).cdf).pvalue > 1e-6
    else:
        mean, std = {"uniform": (0, 1), "truncated_normal": (0.5, 0.3), "off": (-0.6, 0.5)}[name]
        expected = u_of.logpdf((u - mean) / std) - np.log(std)
        assert stats.kstest(((u - mean) / std).ravel(), u_of.cdf).pvalue > 1e-6
    np.testing.assert_allclose(log_q, expected, atol=2e-4)


def test_a_noise_is_learned_by_its_gradient():
    x0 = draw(500)[1]

    def mean(parameters):
        def level(x0):
            return parameters["slope"] * x0 + parameters["shift"]

        noise = likelihood.logit_normal(level, jnp.exp(parameters["log_std"]))
        return jnp.mean(
            likelihood.dequantized_bits(
                jax.random.key(0), log_density("levels"), x0, noise, num_levels=LEVELS
            )[0]
        )

    step = jax.jit(jax.value_and_grad(mean))
    parameters = {"slope": jnp.zeros(()), "shift": jnp.zeros(()), "log_std": jnp.zeros(())}
    values = []
    for _ in range(60):
        value, gradient = step(parameters)
        values.append(float(value))
        parameters = jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradient)
    k = draw(500)[0]
    true = -log_p(k).mean() / np.log(2)
    plain = bits(x0)[0].mean()
    assert true < values[-1] < 0.5 * true + 0.5 * plain
    assert values[-1] < values[0]


def test_importance_weights_do_not_overflow():
    log_weights = jnp.array([[-1000.0, 1000.0, -np.inf], [-1001.0, 990.0, -np.inf]])
    expected = [-1000 + np.log((1 + np.exp(-1)) / 2), 1000 + np.log((1 + np.exp(-10)) / 2), -np.inf]
    np.testing.assert_allclose(likelihood.importance_weighted(log_weights), expected, rtol=1e-6)


def test_draws_are_by_address_and_masks_count():
    _, x0 = draw(5)
    whole, weights = bits(x0, num_draws=2)
    part, _ = bits(x0[3:], num_draws=2, index=jnp.arange(3, 5))
    np.testing.assert_array_equal(part, whole[3:])
    assert np.all(weights[0] != weights[1])
    mask = np.array([True, False])
    shift, n = EDGES["levels"]
    one = denoisers.gaussian([(CENTRE - shift) * 2 / n - 1], WIDTH * 2 / n)
    dirty = jnp.where(mask, x0, jnp.nan)
    got, kept = bits(
        dirty, likelihood.logit_normal(), density=lambda x: one.log_density(x[:, :1], CLEAN),
        mask=mask,
    )  # fmt: skip

    def total(keys, x0):
        u, log_q = likelihood.logit_normal()(keys, x0)
        return u, log_q[:, 0]

    same, _ = bits(
        dirty, total, density=lambda x: one.log_density(x[:, :1], CLEAN), mask=mask
    )  # fmt: skip
    np.testing.assert_allclose(got, same, rtol=1e-5)
    np.testing.assert_allclose(got, -kept[0] / np.log(2), rtol=1e-5)


def test_bad_arguments_are_refused():
    _, x0 = draw(4)

    def call(x0=x0, noise=likelihood.uniform, num_levels=LEVELS, **kwargs):
        return likelihood.dequantized_bits(
            jax.random.key(0), lambda x: x[:, 0], x0, noise, num_levels=num_levels, **kwargs
        )

    for kwargs, match in (
        ({"num_levels": 1}, "num_levels must be at least 2"),
        ({"num_levels": 256}, "x0 must lie on 256 levels"),
        ({"x0": 2 * x0 + 5}, "x0 must lie on 8 levels"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"placement": "middle"}, 'placement must be "levels" or "interval"'),
        ({"mask": jnp.ones((3, 3))}, "mask must broadcast"),
        ({"noise": lambda keys, x0: (x0[:, 0], x0)}, "noise must return u"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**kwargs)
    with pytest.raises(TypeError, match="must be floating"):
        call(jnp.zeros((2, 2), jnp.uint8))
    for make in (likelihood.truncated_normal, lambda std: likelihood.logit_normal(0.0, std)):
        with pytest.raises(ValueError, match="std must be positive"):
            make(0.0)
