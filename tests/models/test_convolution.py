"""Convolutions that a CPU computes fast, against plain ones and through every derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdiff.models import UNet, convolution

SAME = {"strides": (1, 1), "padding": [(1, 1), (1, 1)]}
NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
# Shapes that are worth Winograd's way; a batch of 8 images of 8 x 8 has 512 positions.
X, KERNEL = (8, 8, 8, 32), (3, 3, 32, 40)


def plain(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), **options):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **(NHWC | options))


def arrays(x=X, kernel=KERNEL, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)


def counted(f, *args):
    """The FLOPs that the compiled program has."""
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def test_has_fewer_products_on_a_cpu():
    x, kernel = arrays((8, 8, 8, 128), (3, 3, 128, 128))
    convolve = functools.partial(convolution.convolve, **SAME, **NHWC)
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
    ],
)
def test_what_winograd_is_not_for_is_one_convolution(x, kernel, how):
    x, kernel = jax.ShapeDtypeStruct(x, jnp.float32), jax.ShapeDtypeStruct(kernel, jnp.float32)
    names = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}
    options = {**SAME, "dimension_numbers": names[len(x.shape)], **how}
    lowered = jax.jit(functools.partial(convolution.convolve, **options)).lower(x, kernel)
    assert lowered.as_text().count("stablehlo.convolution") == 1


@pytest.mark.parametrize(
    ("x", "kernel", "how"),
    [
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
    options = {**SAME, **NHWC, **how}
    program = jax.make_jaxpr(functools.partial(convolution.convolve, **options))(x, kernel)
    assert [equation.primitive.name for equation in program.eqns] == ["conv_general_dilated"]


@st.composite
def convolutions(draw):
    """Shapes of x and a kernel, strides and padding, that leave something to compute."""
    axes = draw(st.integers(1, 3))
    each = {"min_size": axes, "max_size": axes}
    widths = draw(st.lists(st.integers(1, 3), **each))
    strides = draw(st.lists(st.integers(1, 3), **each))
    padding = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), **each))
    spatial = [width + draw(st.integers(0, 4)) for width in widths]
    batch, channels, features = draw(st.tuples(*[st.integers(1, 3)] * 3))
    return (
        (batch, *spatial, channels),
        (*widths, channels, features),
        {"strides": tuple(strides), "padding": padding},
    )


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@given(convolutions(), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_derivatives_are_exact_for_any_shape_stride_and_padding(one_device, shapes, seed):
    (*shapes, how), axes = shapes, len(shapes[0]) - 2
    names = ("NHWD"[: 1 + axes] + "C", "HWD"[:axes] + "IO", "NHWD"[: 1 + axes] + "C")
    # Whole numbers, whose sums have no order.
    generator = np.random.default_rng(seed)
    (x, kernel), (dx, dkernel) = (
        [jnp.asarray(generator.integers(-4, 5, shape), jnp.float32) for shape in shapes]
        for _ in range(2)
    )

    def derivatives(f):
        f = functools.partial(f, dimension_numbers=names, **how)
        y, pull = jax.vjp(f, x, kernel)
        dy = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape) % 7 - 3
        return pull(dy), jax.jvp(f, (x, kernel), (dx, dkernel))

    found, expected = derivatives(convolution.convolve), derivatives(plain)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_gradients_have_the_layout_that_is_fast_in_loops(strides, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel = arrays((3, 8, 8, 4), (3, 3, 4, 5))

    def loss(x, kernel):
        y = convolution.convolve(x, kernel, strides, [(1, 1), (1, 1)], **NHWC)
        return jnp.sum(jnp.sin(y))

    def body(carry, _):
        return jax.tree.map(jnp.subtract, carry, jax.grad(loss, (0, 1))(*carry)), None

    program = jax.jit(lambda *args: jax.lax.scan(body, args, length=3)[0]).lower(x, kernel)
    lines = [line for line in program.compile().as_text().splitlines() if "dim_labels" in line]
    assert len(lines) == 3
    assert all("dim_labels=b01f_01io->b01f" in line for line in lines), lines


@pytest.mark.parametrize("mapped", [False, True])
def test_each_device_computes_its_share_of_a_gradient(mapped):
    mesh = jax.sharding.Mesh(jax.devices()[:4], "data")
    rows, whole = jax.P("data"), jax.P()
    x, kernel = arrays((8, 8, 8, 4), (3, 3, 4, 8))
    dy = jnp.sin(jnp.arange(8.0**4).reshape(8, 8, 8, 8))

    def gradient_by(f, x, dy):
        return jax.vjp(lambda kernel: f(x, kernel), kernel)[1](dy)[0]

    gradient = functools.partial(
        gradient_by, functools.partial(convolution.convolve, **SAME, **NHWC)
    )
    shares = jax.shard_map(gradient, mesh=mesh, in_specs=(rows, rows), out_specs=whole)
    places = [jax.NamedSharding(mesh, spec) for spec in (rows, whole)]
    divided = jax.jit(
        shares if mapped else gradient, in_shardings=(places[0],) * 2, out_shardings=places[1]
    )
    assert divided.lower(x, dy).compile().cost_analysis()["flops"] < 0.3 * counted(gradient, x, dy)
    expected = gradient_by(plain, x, dy)
    np.testing.assert_allclose(divided(x, dy), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_is_not_differentiated_costs_nothing():
    x, kernel = arrays((3, 8, 8, 4), (3, 3, 4, 5))
    convolve = functools.partial(convolution.convolve, **SAME, **NHWC)
    once = counted(convolve, x, kernel)
    in_x = counted(lambda x: jax.jvp(lambda x: convolve(x, kernel), (x,), (x,)), x)
    in_kernel = counted(lambda k: jax.jvp(lambda k: convolve(x, k), (k,), (k,)), kernel)
    assert max(in_x, in_kernel) < 2.2 * once


def test_whoever_asks_for_precision_gets_it():
    convolve = functools.partial(convolution.convolve, **SAME, **NHWC)
    with jax.default_matmul_precision("float32"):
        program = jax.make_jaxpr(convolve)(*arrays())
    assert [equation.primitive.name for equation in program.eqns] == ["conv_general_dilated"]


def test_other_devices_keep_their_convolutions():
    x, kernel = arrays()
    convolve = jax.jit(functools.partial(convolution.convolve, **SAME, **NHWC))
    for platform, expected in (("tpu", 1), ("cuda", 1), ("cpu", 0)):  # Winograd's has none
        text = convolve.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == expected, platform


def test_every_derivative_is_that_of_the_plain_one():
    (x, kernel), (dx, dkernel) = arrays(), arrays(seed=1)
    convolve = functools.partial(convolution.convolve, **SAME, **NHWC)

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
