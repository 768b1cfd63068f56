"""Every parameterization against the definition of its target, on all kinds of node."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdiff import predictions, schedules
from jaxdiff.base import Node
from jaxdiff.process import diffuse

ROWS = {
    "x0": predictions.x0,
    "eps": predictions.eps,
    "v": predictions.v,
    "score": predictions.score,
    "flow": predictions.flow,
    "edm": predictions.edm(0.5),
}
# Each target as its paper writes it, in float64.
TARGETS = {
    "x0": lambda x0, eps, alpha, sigma: x0,
    "eps": lambda x0, eps, alpha, sigma: eps,
    "v": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "score": lambda x0, eps, alpha, sigma: (alpha * x0 - (alpha * x0 + sigma * eps)) / sigma**2,
    "flow": lambda x0, eps, alpha, sigma: eps - x0,
    # Karras et al. 2022, eq. 8: the paper's process is x0 + s eps with s = sigma / alpha.
    "edm": lambda x0, eps, alpha, sigma: edm_target(x0, eps, sigma / alpha),
}


def edm_target(x0, eps, s, sigma_data=0.5):
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / np.sqrt(s**2 + sigma_data**2)
    return (x0 - c_skip * (x0 + s * eps)) / c_out


values = hnp.arrays(np.float32, (2, 3, 1), elements=st.floats(-1, 1, width=32))


@pytest.mark.parametrize("name", ROWS)
@given(x0=values, eps=values, angle=st.floats(0.02, 1.5), scale=st.floats(0.5, 2))
def test_target_and_inverse(name, x0, eps, angle, scale):
    alpha, sigma = scale * np.cos(angle), scale * np.sin(angle)
    node = Node(jnp.int32(0), jnp.float32(alpha), jnp.float32(sigma))
    target = ROWS[name].target(jnp.asarray(x0), jnp.asarray(eps), node)
    expected = TARGETS[name](x0.astype(np.float64), eps.astype(np.float64), alpha, sigma)
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5 / min(sigma, 1))
    x = diffuse(jnp.asarray(x0), jnp.asarray(eps), node)
    np.testing.assert_allclose(ROWS[name].x0(target, x, node), x0, atol=2e-6 / min(alpha, 1))


@pytest.mark.parametrize("source", ROWS)
@pytest.mark.parametrize("target", ROWS)
def test_conversions_agree_with_the_targets(source, target):
    key = jax.random.key(0)
    x0, eps = jax.random.normal(key, (2, 4, 3, 1))
    node = schedules.cosine().at(jnp.array([1, 300, 600, 900]))
    x = diffuse(x0, eps, node)
    out = predictions.convert(
        ROWS[source].target(x0, eps, node), x, node, ROWS[source], ROWS[target]
    )
    expected = ROWS[target].target(x0, eps, node)
    tolerance = np.asarray(2e-6 / node.over(x).sigma ** 2 + 2e-6 / node.over(x).alpha)
    assert np.all(np.abs(out - expected) <= tolerance)


@pytest.mark.parametrize("name", ROWS)
def test_an_error_in_the_output_is_worth_what_equation_3_says(name):
    row = ROWS[name]
    node = schedules.linear().at(jnp.array([0, 10, 500, 999]))
    x = jax.random.normal(jax.random.key(0), (4, 5))
    out = jax.random.normal(jax.random.key(1), (4, 5))
    _, slope = jax.jvp(lambda out: row.x0(out, x, node), (out,), (jnp.ones_like(out),))
    a, b = row.row(node)
    expected = node.sigma / (b * node.alpha - node.sigma * a)
    np.testing.assert_allclose(np.abs(slope[:, 0]), np.abs(expected), rtol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_divided_by_sigma_at_a_clean_node(name):
    clean = Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))
    x = jax.random.normal(jax.random.key(0), (2, 3))
    out = jnp.ones((2, 3))
    if name not in ("x0",):  # the network itself is the clean data
        np.testing.assert_allclose(ROWS[name].x0(out, x, clean), x, rtol=1e-6)
    chex.assert_trees_all_equal(predictions.eps_from_x0(x, x, clean), jnp.zeros_like(x))
    grad = jax.grad(lambda x: predictions.eps_from_x0(x * x, x, clean).sum())(x)
    chex.assert_tree_all_finite(grad)


@pytest.mark.parametrize("name", ["x0", "v", "flow", "edm"])
def test_zero_signal_is_legal_where_it_can_be(name):
    noise = Node(jnp.int32(9), jnp.float32(0), jnp.float32(1))
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4))
    target = ROWS[name].target(x0, eps, noise)
    np.testing.assert_allclose(ROWS[name].x0(target, eps, noise), x0, atol=1e-6)
    predictions.check_signal(ROWS[name], alpha_can_vanish=True)


@pytest.mark.parametrize("name", ["eps", "score"])
def test_zero_signal_is_refused_where_it_is_singular(name):
    with pytest.raises(ValueError, match=f"{name} prediction is singular"):
        predictions.check_signal(ROWS[name], alpha_can_vanish=True)


def test_bad_arguments_are_refused():
    node = schedules.linear().at(3)
    with pytest.raises(ValueError, match="x0 and eps must have the same shape"):
        predictions.v.target(jnp.zeros((2, 3)), jnp.zeros((2, 4)), node)
    with pytest.raises(ValueError, match="output and x must have the same shape"):
        predictions.v.x0(jnp.zeros((2, 3, 2)), jnp.zeros((2, 3, 1)), node)
    with pytest.raises(ValueError, match="sigma_data"):
        predictions.edm(0)
