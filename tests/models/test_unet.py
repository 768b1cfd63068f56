"""The UNet and its parts, against explicit references in float64 and against their promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import (
    AttentionBlock,
    GroupNorm,
    ResidualBlock,
    UNet,
    per_example_dropout,
    sinusoidal_embedding,
    upsample_nearest,
)
from jaxdiff.models.layers import group_count

SMALL = dict(out_channels=2, channels=8, channel_multipliers=(1, 2), num_res_blocks=1)


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def keys_of(seed, batch=3):
    return jax.random.split(jax.random.key(seed), batch)


def scrambled(model, *args):
    """Parameters with nothing left at 0, so that every layer counts; compiles nothing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        base = 1.0 if path[-1].key == "scale" else 0.0
        width = 0.1 if leaf.ndim < 2 else 0.2
        return jnp.asarray(base + width * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def small():
    model = UNet(**SMALL, dropout=0.5)
    x = draw(2, (3, 4, 4, 2))
    t = jnp.array([1, 50, 900])
    return model, scrambled(model, x, t), x, t


@pytest.fixture(scope="module")
def apply(small):
    model, params, _, _ = small
    return jax.jit(functools.partial(model.apply, params))


def test_has_the_parameters_of_the_papers_cifar10_model():
    model = UNet(out_channels=3, dropout=0.1)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == 35_746_307
    assert {"down_1_attention_1", "down_2_downsample", "mid_block_1", "up_3_block_2"} <= set(
        shapes["params"]
    )


@pytest.mark.parametrize("spatial", [(8,), (4, 8), (4, 4, 2)])
def test_shape_for_any_number_of_axes(spatial):
    x = draw(0, (2, *spatial, 3))
    out = jax.jit(UNet(**SMALL).apply)(scrambled(UNet(**SMALL), x, 0), x, 7)
    assert out.shape == (2, *spatial, 2)
    assert out.dtype == jnp.float32
    assert np.all(np.isfinite(out))
    assert np.any(out != 0)


def test_output_is_zero_at_initialisation():
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles thrice as fast
    out, _ = jax.jit(UNet(**SMALL).init_with_output)(key, draw(0, (2, 8, 3)), 7)
    assert not np.any(out)


def test_parameters_do_not_depend_on_the_size_of_the_input():
    def shapes(size):
        x = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
        return jax.eval_shape(UNet(**SMALL).init, jax.random.key(0), x, 0)

    assert shapes(8) == shapes(32)


def test_sinusoidal_embedding_is_the_formula_in_float64():
    t = np.array([0, 1, 10, 999])
    f = 10000.0 ** (-np.arange(8) / 7)
    expected = np.concatenate([np.sin(t[:, None] * f), np.cos(t[:, None] * f)], axis=1)
    got = sinusoidal_embedding(jnp.asarray(t), 16)
    np.testing.assert_allclose(got, expected, atol=1e-4)  # 999 has an ulp of 6e-5
    np.testing.assert_array_equal(got, sinusoidal_embedding(jnp.asarray(t, jnp.float32), 16))


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 5e-6), (1000.0, 3e-4)])
@pytest.mark.parametrize("spatial", [(7,), (4, 5)])
def test_group_norm_is_the_formula_in_float64(offset, tolerance, spatial):
    x = draw(0, (3, *spatial, 12)) + offset  # an ulp of 1000 is 6e-5
    module = GroupNorm(num_groups=3)
    params = scrambled(module, x)
    got = module.apply(params, x)

    groups = np.asarray(x, np.float64).reshape(3, -1, 3, 4)
    mean = groups.mean((1, 3), keepdims=True)
    groups = (groups - mean) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    scale, bias = (np.asarray(params["params"][name], np.float64) for name in ("scale", "bias"))
    np.testing.assert_allclose(got, groups.reshape(x.shape) * scale + bias, atol=tolerance)


def test_group_norm_keeps_its_gradient_under_an_offset():
    x, weights = draw(0, (2, 6, 8)), draw(1, (2, 6, 8))
    module = GroupNorm(num_groups=2)
    params = module.init(jax.random.key(0), x)

    def textbook(x):
        g = x.reshape(2, 6, 2, 4)
        g = g - g.mean((1, 3), keepdims=True)
        return (g / jnp.sqrt((g * g).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)

    expected = jax.grad(lambda x: jnp.sum(weights * textbook(x)))(x)
    for offset, tolerance in ((0.0, 1e-5), (100.0, 1e-4)):
        got = jax.grad(lambda x: jnp.sum(weights * module.apply(params, x)))(x + offset)
        np.testing.assert_allclose(got, expected, atol=tolerance)


def test_group_norm_of_a_constant_is_its_bias():
    x = jnp.full((2, 4, 8), 3.0)
    params = scrambled(GroupNorm(), x)
    got = GroupNorm().apply(params, x)
    np.testing.assert_allclose(got, jnp.broadcast_to(params["params"]["bias"], x.shape), atol=1e-6)


def test_groups_divide_the_channels_and_are_never_of_one_channel():
    assert [group_count(c, 32, 4) for c in (32, 64, 96, 128, 144, 384, 8, 3)] == [
        *(8, 16, 24, 32, 24, 32, 2, 1)
    ]
    assert group_count(32, 32, 1) == 32


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("spatial", [(5,), (2, 3)])
def test_attention_is_an_explicit_softmax(heads, spatial):
    x = draw(0, (2, *spatial, 8))
    module = AttentionBlock(num_heads=heads)
    params = scrambled(module, x)
    dense = jax.tree.map(lambda p: np.asarray(p, np.float64), params["params"])
    h = np.asarray(GroupNorm().apply({"params": params["params"]["norm"]}, x), np.float64)
    h = h.reshape(2, -1, 8)
    q, k, v = (
        (h @ dense[n]["kernel"] + dense[n]["bias"]).reshape(2, -1, heads, 8 // heads)
        for n in ("query", "key", "value")
    )
    weights = np.exp(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8 / heads))
    weights /= weights.sum(-1, keepdims=True)
    h = np.einsum("bhts,bshd->bthd", weights, v).reshape(2, -1, 8)
    expected = np.asarray(x) + (h @ dense["out"]["kernel"] + dense["out"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-5)


def test_upsampling_repeats_entries():
    x = draw(0, (2, 3, 2, 4))
    np.testing.assert_array_equal(upsample_nearest(x), np.repeat(np.repeat(x, 2, 1), 2, 2))


def test_noise_level_is_heard_and_a_scalar_is_a_level_for_all(small, apply):
    _, params, x, _ = small
    assert np.abs(apply(x, jnp.full(3, 1)) - apply(x, jnp.full(3, 900))).max() > 0.01
    all_alike = apply(x, jnp.full(3, 50))
    np.testing.assert_allclose(apply(x, 50.0), all_alike, atol=1e-5)
    scaled = jax.jit(UNet(**SMALL, noise_level_scale=1000.0).apply)
    np.testing.assert_allclose(scaled(params, x, 0.05), all_alike, atol=1e-4)


def test_small_models_hear_the_noise_level_in_every_block():
    x, embedding = draw(0, (1, 4, 4, 32)), draw(1, (2, 16))
    module = ResidualBlock(32)
    params = scrambled(module, x, embedding[:1])
    one, other = (module.apply(params, x, embedding[i : i + 1]) for i in (0, 1))
    assert np.abs(one - other).max() > 0.01


def test_an_example_does_not_see_its_neighbours(small, apply):
    _, _, x, t = small
    whole, altered = apply(x, t), apply(x.at[1].set(100.0), t)
    np.testing.assert_array_equal(whole[::2], altered[::2])
    np.testing.assert_allclose(apply(x[:1], t[:1]), whole[:1], atol=1e-5)


def test_dropout_depends_on_the_examples_key_alone(small, apply):
    _, _, x, t = small
    whole = apply(x, t, dropout_keys=keys_of(4))
    assert np.abs(whole - apply(x, t)).max() > 0.01
    assert np.abs(whole - apply(x, t, dropout_keys=keys_of(5))).max() > 0.01
    for one in (slice(0, 1), slice(2, 3)):
        alone = apply(x[one], t[one], dropout_keys=keys_of(4)[one])
        np.testing.assert_allclose(alone, whole[one], atol=1e-5)


def test_dropout_of_rate_zero_takes_keys_and_ignores_them(small, apply):
    _, params, x, t = small
    plain = jax.jit(UNet(**SMALL).apply)(params, x, t, dropout_keys=keys_of(4))
    np.testing.assert_allclose(plain, apply(x, t), atol=1e-5)


def test_dropout_masks():
    x, keys = jnp.ones((4, 5000)), keys_of(0, 4)
    once = per_example_dropout(x, 0.25, keys, 7)
    np.testing.assert_allclose(np.unique(once), [0, 4 / 3], rtol=1e-6)
    # 20,000 coins of 0.75: five standard errors are 0.015; false alarms below one in a million.
    assert abs(float(jnp.mean(once > 0)) - 0.75) < 0.015
    other = per_example_dropout(x, 0.25, keys, 2**32 - 1)
    both = float(jnp.mean((once > 0) & (other > 0)))
    assert abs(both - 0.75**2) < 0.018
    np.testing.assert_array_equal(per_example_dropout(x, 0.25, None, 7), x)


def test_remat_changes_neither_parameters_nor_outputs_nor_gradients():
    x, t, keys = draw(2, (3, 4, 2)), jnp.arange(3), keys_of(4)
    results = []
    for remat in (False, True):
        # One level has blocks of each kind.
        fields = {**SMALL, "channel_multipliers": (1,), "attention_levels": (0,)}
        model = UNet(**fields, dropout=0.5, scale_shift=True, remat=remat)
        params = scrambled(model, x, t)

        def loss(params, model=model):
            out = model.apply(params, x, t, dropout_keys=keys)
            return jnp.mean(jnp.square(out - x)), out

        results.append((params, *jax.jit(jax.value_and_grad(loss, has_aux=True))(params)))
    (params, value, grads), (params_remat, value_remat, grads_remat) = results
    jax.tree.map(np.testing.assert_array_equal, params, params_remat)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, value, value_remat)
    jax.tree.map(close, grads, grads_remat)
    for path, g in jax.tree.leaves_with_path(grads):
        assert np.all(np.isfinite(g)), path
        assert np.any(g != 0), path


def test_scale_shift_scales_and_shifts():
    x, embedding = draw(0, (2, 4, 8)), draw(1, (2, 16))
    module = ResidualBlock(8, scale_shift=True)
    params = scrambled(module, x, embedding)
    assert params["params"]["embedding"]["kernel"].shape == (16, 16)
    # A scale of -1 and no shift silence the branch, up to the last bias.
    told = {"kernel": jnp.zeros((16, 16)), "bias": jnp.repeat(jnp.array([-1.0, 0.0]), 8)}
    silent = {"params": {**params["params"], "embedding": told}}
    bias = params["params"]["conv_1"]["bias"]
    np.testing.assert_allclose(
        module.apply(silent, x, embedding), x + bias[None, None], rtol=1e-6, atol=1e-6
    )


def test_bfloat16_computes_low_and_keeps_parameters_and_output_float32(small, apply):
    _, params, x, t = small
    low = UNet(**SMALL, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(low.init, jax.random.key(0), x, t)
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    got, expected = jax.jit(low.apply)(params, x, t), apply(x, t)
    assert got.dtype == jnp.float32
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_labels_are_heard_and_bad_ones_are_not_clamped():
    model = UNet(**SMALL, num_classes=3)
    x, labels = draw(0, (3, 4, 2)), jnp.arange(3)
    params = scrambled(model, x, 0, labels)
    apply = jax.jit(functools.partial(model.apply, params))
    out, reversed_out = apply(x, 5, labels), apply(x, 5, labels[::-1])
    assert np.abs(out - reversed_out)[::2].max() > 0.01
    np.testing.assert_allclose(reversed_out[1], out[1], atol=1e-5)
    assert np.all(np.isnan(apply(x, 5, jnp.array([0, 3, 1]))[1]))


def test_head_dim_decides_the_number_of_heads():
    x = draw(0, (1, 4, 2))

    def program(**fields):
        model = UNet(**SMALL, **fields)
        return jax.jit(model.apply).lower(scrambled(model, x, 0), x, 3).as_text()

    assert program(head_dim=8) == program(num_heads=2)
    assert program(head_dim=8) != program()


def init(model, x, *args, **kwargs):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, *args, **kwargs))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(attention_levels=(2,)), r"attention_levels must be .*\[0, 2\), got \(2,\).*pixels"),
        (dict(attention_levels=(-1,)), "attention_levels must be"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
        (dict(num_heads=3), "num_heads must be a divisor of the 16 channels of level 1, got 3"),
        (dict(head_dim=32), "head_dim must be a divisor of the 16 channels of level 1, got 32"),
        (dict(num_groups=0), "num_groups must be at least 1, got 0"),
        (dict(min_group_channels=0), "min_group_channels must be at least 1, got 0"),
        (dict(out_channels=0), "out_channels must be at least 1, got 0"),
        (dict(num_res_blocks=0), "num_res_blocks must be at least 1, got 0"),
        (dict(channels=7), "channels must be even and at least 4, got 7"),
        (dict(channels=2), "channels must be even and at least 4, got 2"),
        (dict(channel_multipliers=()), "channel_multipliers must be one positive int per level"),
        (dict(channel_multipliers=(1, 0)), r"channel_multipliers .* got \(1, 0\)"),
        (dict(num_classes=0), "num_classes must be None or at least 1, got 0"),
    ],
)
def test_fields_that_make_no_network_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        init(UNet(**{**SMALL, **fields}), jnp.zeros((2, 4, 4, 1)), 0)


@pytest.mark.parametrize(
    ("x", "level", "kwargs", "message"),
    [
        (jnp.zeros((4, 4)), 0, {}, r"x must be \(B, \*spatial, C\).* got shape \(4, 4\)"),
        (jnp.zeros((1, 4, 4, 4, 4, 1)), 0, {}, "x must be .* 1, 2 or 3 spatial axes"),
        (jnp.zeros((1, 4, 5, 1)), 0, {}, r"divisible by 2, .* got shape \(1, 4, 5, 1\): pad x"),
        (jnp.zeros((1, 4, 4, 1), jnp.int32), 0, {}, "x must be floating, got int32"),
        (jnp.zeros((2, 4, 1)), jnp.zeros(3), {}, r"noise_level must be .*\(2,\), got .*\(3,\)"),
        (jnp.zeros((2, 4, 1)), jnp.zeros((2, 1)), {}, "noise_level must be"),
        (jnp.zeros((2, 4, 1)), True, {}, "noise_level must be int or float"),
        (jnp.zeros((2, 4, 1)), 0, dict(cond=jnp.zeros(2, int)), "cond must be None.*num_classes"),
        (jnp.zeros((2, 4, 1)), 0, dict(dropout_keys=jax.random.key(0)), "dropout_keys must be"),
        (jnp.zeros((2, 4, 1)), 0, dict(dropout_keys=jnp.zeros((2, 2))), "dropout_keys .* typed"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, level, kwargs, message):
    with pytest.raises(ValueError, match=message):
        init(UNet(**SMALL), x, level, **kwargs)


@pytest.mark.parametrize("cond", [None, jnp.zeros(3, int), jnp.zeros(2), jnp.zeros((2, 1), int)])
def test_labels_that_do_not_fit_are_refused(cond):
    with pytest.raises(ValueError, match=r"cond must be int labels of shape \(2,\)"):
        init(UNet(**SMALL, num_classes=3), jnp.zeros((2, 4, 1)), 0, cond)


def test_parts_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="dim must be even and at least 4, got 5"):
        sinusoidal_embedding(jnp.zeros(2), 5)
    with pytest.raises(ValueError, match="num_heads must divide the channels, got 3 heads for 8"):
        AttentionBlock(num_heads=3).init(jax.random.key(0), jnp.zeros((1, 4, 8)))
