"""Convolutions with fewer products against plain ones, in float64 and through every derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdiff.models import UNet, winograd

SAME = {"strides": (1, 1), "padding": [(1, 1), (1, 1)]}
NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
# Shapes that are worth it; a batch of 8 images of 8 x 8 has 512 positions.
X, KERNEL = (8, 8, 8, 32), (3, 3, 32, 40)


def plain(x, kernel, **options):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], **NHWC, **options)


def float64(x, kernel):
    """The definition: nine shifted products, in float64."""
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return sum(
        x[:, i : i + height, j : j + width] @ np.float64(kernel[i, j])
        for i in range(3)
        for j in range(3)
    )


def arrays(x=X, kernel=KERNEL, seed=0):
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
    y = jax.jit(winograd.winograd)(x, kernel)
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
    dx = jax.jit(winograd.winograd_transposed)(dy, kernel)
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
    error, of_plain = (np.abs(f(x, kernel) - exact).max() for f in (winograd.winograd, plain))
    assert 0 < error < 10 * of_plain


def counted(f, *args):
    """The FLOPs that the compiled program has."""
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def test_has_fewer_products_on_a_cpu():
    x, kernel = arrays((8, 8, 8, 128), (3, 3, 128, 128))
    convolve = functools.partial(winograd.convolve, **SAME, **NHWC)
    assert counted(convolve, x, kernel) < 0.7 * counted(plain, x, kernel)
    # In gradients of x, too.
    found, expected = (
        counted(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x, kernel)))), x)
        for f in (convolve, plain)
    )
    assert found < 0.7 * expected


@pytest.mark.parametrize(
    ("x", "kernel", "how"),
    [
        pytest.param((8, 8, 8, 32), (3, 3, 32, 8), {}, id="few channels"),
        pytest.param((1, 8, 8, 256), (3, 3, 256, 256), {}, id="few positions"),
        pytest.param((32, 32, 32, 64), (3, 3, 64, 64), {}, id="much to transform"),
        pytest.param((16, 7, 8, 32), (3, 3, 32, 32), {}, id="odd"),
        pytest.param((64, 8, 32), (3, 32, 32), {"strides": (1,), "padding": [(1, 1)]}, id="1-D"),
        pytest.param(X, KERNEL, {"strides": (2, 2)}, id="stride"),
        pytest.param(X, KERNEL, {"padding": [(0, 1), (0, 1)]}, id="padding"),
        pytest.param(X, KERNEL, {"precision": jax.lax.Precision.HIGHEST}, id="precision"),
        pytest.param(X, (3, 3, 8, 40), {"feature_group_count": 4}, id="groups"),
        pytest.param(X, KERNEL, {"rhs_dilation": (2, 2)}, id="dilation"),
        pytest.param(X, KERNEL, {"lhs_dilation": (2, 2)}, id="transposed"),
        pytest.param(X, KERNEL, {"preferred_element_type": jnp.float32}, id="type"),
        pytest.param(
            (16, 32, 16, 32),
            (3, 3, 32, 32),
            {"dimension_numbers": ("NCHW", "HWIO", "NCHW")},
            id="channels first",
        ),
    ],
)
def test_other_convolutions_are_left_alone(x, kernel, how):
    x, kernel = jax.ShapeDtypeStruct(x, jnp.float32), jax.ShapeDtypeStruct(kernel, jnp.float32)
    names = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}
    options = {**SAME, "dimension_numbers": names[len(x.shape)], **how}
    program = jax.make_jaxpr(functools.partial(winograd.convolve, **options))(x, kernel)
    assert [equation.primitive.name for equation in program.eqns] == ["conv_general_dilated"]


def test_whoever_asks_for_precision_gets_it():
    convolve = functools.partial(winograd.convolve, **SAME, **NHWC)
    with jax.default_matmul_precision("float32"):
        program = jax.make_jaxpr(convolve)(*arrays())
    assert [equation.primitive.name for equation in program.eqns] == ["conv_general_dilated"]


def test_other_devices_keep_their_convolutions():
    x, kernel = arrays()
    convolve = jax.jit(functools.partial(winograd.convolve, **SAME, **NHWC))
    for platform, expected in (("tpu", 1), ("cuda", 1), ("cpu", 0)):
        text = convolve.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == expected, platform


def test_every_derivative_is_that_of_the_plain_one():
    (x, kernel), (dx, dkernel) = arrays(), arrays(seed=1)
    convolve = functools.partial(winograd.convolve, **SAME, **NHWC)

    def derivatives(f):
        def loss(x, kernel):
            return jnp.mean(jnp.sin(f(x, kernel)))

        gradient = jax.grad(loss, (0, 1))
        return {
            "value": f(x, kernel),
            "forwards": jax.jvp(f, (x, kernel), (dx, dkernel))[1],
            "backwards": gradient(x, kernel),
            "twice": jax.jvp(gradient, (x, kernel), (dx, dkernel))[1],
            "mapped": jax.vmap(f, (0, None))(x[:, None], kernel),
            "remat": jax.grad(jax.checkpoint(loss))(x, kernel),
        }

    found, expected = (jax.jit(functools.partial(derivatives, f))() for f in (convolve, plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()),
        found,
        expected,
    )


def test_a_network_is_the_same_function_either_way():
    model = UNet(1, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=())
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), x, 0)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draws = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, draws)
    y = jax.jit(model.apply)(params, x, 5)
    with jax.default_matmul_precision("float32"):
        expected = jax.jit(model.apply)(params, x, 5)
    assert not np.array_equal(y, expected)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
