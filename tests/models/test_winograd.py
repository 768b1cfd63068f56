"""Winograd's convolutions against the definition, in float64."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdiff.models import winograd

NHWC = ("NHWC", "HWIO", "NHWC")


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=NHWC)


def float64(x, kernel):
    """The definition: nine shifted products, in float64."""
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return sum(
        x[:, i : i + height, j : j + width] @ np.float64(kernel[i, j])
        for i in range(3)
        for j in range(3)
    )


def arrays(x, kernel, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_equals_the_definition_for_any_even_shape(sizes, channels, features, seed):
    batch, height, width = sizes
    x, kernel = arrays((batch, 2 * height, 2 * width, channels), (3, 3, channels, features), seed)
    y = jax.jit(winograd.convolve)(x, kernel)
    assert y.shape == (batch, 2 * height, 2 * width, features)
    np.testing.assert_allclose(y, float64(x, kernel), rtol=0, atol=1e-4)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_the_transpose_is_the_gradient_of_the_definition(sizes, channels, features, seed):
    batch, height, width = sizes
    x, kernel = arrays((batch, 2 * height, 2 * width, channels), (3, 3, channels, features), seed)
    dy = jax.random.normal(jax.random.key(seed + 100), (*x.shape[:3], features))
    dx = jax.jit(winograd.gradient)(dy, kernel)
    assert dx.shape == x.shape
    # <y, dy> = <x, dx>, in float64 for y, of directions at random.
    for key in jax.random.split(jax.random.key(seed), 3):
        x = jax.random.normal(key, x.shape)
        expected = np.sum(float64(x, kernel) * np.asarray(dy, np.float64))
        found = np.sum(np.asarray(x, np.float64) * np.asarray(dx, np.float64))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * dy.size)


def test_loses_little_more_than_a_plain_convolution():
    x, kernel = arrays((2, 16, 16, 128), (3, 3, 128, 128))
    exact = float64(x, kernel)
    error, of_plain = (np.abs(f(x, kernel) - exact).max() for f in (winograd.convolve, plain))
    assert 0 < error < 10 * of_plain
