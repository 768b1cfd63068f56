"""The options of the UNet that other libraries' checkpoints need.

Whole networks with them are compared with those libraries' in `tests/interop`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import (
    GroupNorm,
    ResidualBlock,
    UNet,
    layers,
    sinusoidal_embedding,
    upsample_nearest,
)
from jaxdiff.models.layers import AttentionBlock, convolution, downsample_mean

SMALL = dict(
    out_channels=2, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=()
)


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scrambled(model, *args):
    """Parameters with nothing left at 0, so that every layer counts; compiles nothing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        base = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(base + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(fill, shapes)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("cosine_first", [False, True])
def test_sinusoidal_embedding_with_a_shift_and_in_both_orders(shift, cosine_first):
    t = np.array([0, 1, 10, 999])
    angles = t[:, None] * 10000.0 ** (-np.arange(8) / (8 - shift))
    parts = [np.sin(angles), np.cos(angles)]
    expected = np.concatenate(parts[::-1] if cosine_first else parts, axis=1)
    got = sinusoidal_embedding(jnp.asarray(t), 16, shift, cosine_first)
    np.testing.assert_allclose(got, expected, atol=1e-4)  # 999 has an ulp of 6e-5


def test_a_shift_that_leaves_no_frequencies_is_refused():
    with pytest.raises(ValueError, match="frequency_shift must be less than 2, half of dim, got 2"):
        sinusoidal_embedding(jnp.zeros(2), 4, 2)


@pytest.mark.parametrize("before", [0, 1])
def test_downsampling_sees_so_many_zeros_before_the_data(before):
    x = draw(0, (2, 8, 3))
    module = convolution(4, 1, stride=2, padding_before=before)
    params = scrambled(module, x)
    kernel, bias = (np.asarray(params["params"][name], np.float64) for name in ("kernel", "bias"))
    padded = np.pad(x.astype(np.float64), ((0, 0), (before, 1), (0, 0)))
    windows = np.stack([padded[:, 2 * i : 2 * i + 3] for i in range(4)], axis=1)
    expected = np.einsum("bikc,kcd->bid", windows, kernel) + bias
    np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-5)


@pytest.mark.parametrize("spatial", [(6,), (4, 6), (2, 4, 2)])
def test_means_of_neighbours(spatial):
    x = draw(0, (2, *spatial, 3))
    expected = x
    for axis in range(1, x.ndim - 1):
        expected = (expected.take(range(0, expected.shape[axis], 2), axis)
                    + expected.take(range(1, expected.shape[axis], 2), axis)) / 2  # fmt: skip
    np.testing.assert_allclose(downsample_mean(jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize("change", [downsample_mean, upsample_nearest])
def test_a_block_changes_the_resolution_before_its_first_convolution_and_around(change):
    x, embedding = draw(0, (2, 4, 8)), draw(1, (2, 16))
    module = ResidualBlock(8, resample=change)
    params = scrambled(module, x, embedding)
    own = params["params"]

    def conv(name, h):
        return convolution(8, 1).apply({"params": own[name]}, h)

    def norm(name, h):
        return GroupNorm().apply({"params": own[name]}, h)

    h = conv("conv_0", change(jax.nn.silu(norm("norm_0", x))))
    told = embedding @ np.asarray(own["embedding"]["kernel"]) + np.asarray(own["embedding"]["bias"])
    h = conv("conv_1", jax.nn.silu(norm("norm_1", h + told[:, None])))
    np.testing.assert_allclose(module.apply(params, x, embedding), change(x) + h, atol=1e-5)


def test_attention_without_a_normalisation():
    x = draw(0, (2, 5, 8))
    module = AttentionBlock(norm=None)
    params = scrambled(module, x)
    assert "norm" not in params["params"]
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    q, k, v = (x @ p[name]["kernel"] + p[name]["bias"] for name in ("query", "key", "value"))
    weights = np.exp(np.einsum("btd,bsd->bts", q, k) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    expected = x + (weights @ v) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-5)


def test_flash_attention_is_attention():
    # cuDNN's where there is a GPU, elsewhere the very same program.
    x = draw(0, (2, 16, 8)).astype(jnp.bfloat16)
    plain = AttentionBlock(dtype=jnp.bfloat16)
    params = scrambled(plain, x)
    mask = jnp.asarray(np.arange(16) < np.array([16, 6])[:, None])

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(flash, params, mask):
        model = plain.clone(flash=flash)
        return jax.grad(lambda p: jnp.mean(jnp.square(model.apply(p, x, x_mask=mask))))(params)

    for own in (None, mask):
        found, expected = (
            jax.tree.leaves(gradients(flash, params, own)) for flash in (True, False)
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0.1, atol=0.02 * np.abs(other).max())

    model, t = UNet(**SMALL, flash_attention=True), jnp.array([3, 700])
    heard = model.clone(dtype=jnp.bfloat16)
    jax.eval_shape(heard.init, jax.random.key(0), x, t)
    with pytest.raises(ValueError, match=r"dtype must be bfloat16 or float16 .* got float32"):
        jax.eval_shape(model.init, jax.random.key(0), x, t)


def test_flash_attention_is_by_cudnn_where_it_can_and_on_its_devices_alone(monkeypatch):
    by_xla = jax.nn.dot_product_attention

    def stand_in(query, key, value, *, mask, implementation=None):
        if implementation is None:
            return by_xla(query, key, value, mask=mask)
        if no_cudnn:
            raise RuntimeError("cuDNN is not detected.")
        if query.shape[-1] > 128:
            raise NotImplementedError("The head dim must be <= 128")
        assert implementation == "cudnn"
        assert mask is None or mask.shape == (2, 1, 5, 7)
        return jnp.cos(query)  # nothing else has one

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)

    def text(platform, width, mask=None, **options):
        shapes = [jax.ShapeDtypeStruct((2, n, 1, width), jnp.bfloat16) for n in (5, 7, 7)]
        function = jax.jit(functools.partial(layers.attend, mask=mask, **options))
        return function.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()

    no_cudnn, mask = False, jnp.ones((2, 7), bool)
    assert "cosine" in text("cuda", 128, flash=True)
    assert "cosine" in text("cuda", 128, mask, flash=True)
    for platform in ("cpu", "tpu"):
        assert "cosine" not in text(platform, 128, flash=True)
    assert text("cuda", 256, mask, flash=True) == text("cuda", 256, mask)
    assert "cosine" not in text("cuda", 256, flash=True)
    assert "cosine" not in text("cuda", 128)
    no_cudnn = True
    assert "cosine" not in text("cuda", 128, flash=True)


def test_concatenations_are_written_once_on_nvidia_gpus_alone():
    x, t = draw(0, (2, 4, 2)), jnp.array([3, 700])
    model = UNet(**SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)

    def count(platform):
        lowered = jax.jit(model.apply).trace(shapes, x, t).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("optimization_barrier")

    assert count("cuda") == 4  # two on the way up, of each of two levels
    assert count("cpu") == count("tpu") == 0


def test_each_option_is_heard_and_has_the_parameters_that_it_says():
    x, t = draw(0, (2, 4, 2)), jnp.array([3, 700])

    def program(**field):
        model = UNet(**SMALL, **field)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)
        return shapes, jax.jit(model.apply).lower(shapes, x, t).as_text()

    shapes, plain = program()
    for field in (
        dict(frequency_shift=0.0),
        dict(cosine_first=True),
        dict(norm_epsilon=1e-5),
        dict(downsample_padding=1),
    ):
        shapes_with, text = program(**field)
        assert shapes_with == shapes
        assert text != plain, field
    bare = scrambled(UNet(**SMALL, mid_attention_norm=False), x, t)["params"]
    assert set(bare["mid_attention"]) == {"query", "key", "value", "out"}
    blocks = scrambled(UNet(**SMALL, resample_blocks=True), x, t)["params"]
    for name in ("down_0_downsample", "up_1_upsample"):
        assert set(blocks[name]) == {"norm_0", "conv_0", "embedding", "norm_1", "conv_1"}


def test_with_them_an_example_is_what_it_is_alone_and_garbage_is_not_seen():
    model = UNet(**SMALL, resample_blocks=True, scale_shift=True, downsample_padding=1, remat=True)
    x, t = draw(0, (2, 12, 2)), jnp.array([3, 700])
    params = scrambled(model, x, t)
    mask = jnp.asarray(np.arange(12) < np.array([12, 5])[:, None])
    apply = jax.jit(model.apply)
    zeros, garbage = (jnp.where(mask[..., None], x, fill) for fill in (0.0, jnp.nan))
    out = apply(params, garbage, t, {"mask": mask})
    np.testing.assert_array_equal(out, apply(params, zeros, t, {"mask": mask}))
    alone = apply(params, x[1:, :6], t[1:], {"mask": mask[1:, :6]})
    np.testing.assert_allclose(out[1, :6], alone[0], atol=1e-5)
    full = {"mask": jnp.ones((2, 12), bool)}
    np.testing.assert_allclose(out[0], apply(params, x, t, full)[0], atol=1e-5)
    np.testing.assert_allclose(out[0], apply(params, x, t)[0], atol=1e-5)
    convolved = model.clone(resample_blocks=False)
    params = scrambled(convolved, x, t)
    apply = jax.jit(convolved.apply)
    out = apply(params, garbage, t, {"mask": mask})
    alone = apply(params, x[1:, :6], t[1:], {"mask": mask[1:, :6]})
    np.testing.assert_allclose(out[1, :6], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(downsample_padding=2), "downsample_padding must be 0 or 1, got 2"),
        (dict(norm_epsilon=0.0), "norm_epsilon must be positive, got 0.0"),
        (dict(frequency_shift=4.0), "frequency_shift must be less than 4, half of dim, got 4.0"),
    ],
)
def test_options_that_make_no_network_are_refused(fields, message):
    model = UNet(**SMALL, **fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 4, 1)), 0)
