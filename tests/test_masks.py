"""Padding influences nothing: networks, losses and samplers with masks, against no padding at all.

The references are the same programs on each example alone, cut to its own length: they have no
padding, or less of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdiff import denoisers, grids, losses, predictions, rng, sampling, schedules, solvers
from jaxdiff.base import Node, Prediction
from jaxdiff.models import AttentionBlock, GroupNorm, UNet, read_condition, sequence_positions
from jaxdiff.models.layers import masks_of_levels

SCHEDULE = schedules.linear()
# Two levels, attention at both. What is compiled is small, so it is compiled with little care.
SMALL = dict(
    out_channels=2, channels=8, channel_multipliers=(1, 2), num_res_blocks=1,
    attention_levels=(0,), num_heads=2,
)  # fmt: skip
ONE_LEVEL = {**SMALL, "channel_multipliers": (1,), "attention_levels": ()}
TOLD = dict(num_classes=4, vector_dim=3, sequence_dim=5, image_channels=4, scale_shift=True)
LENGTHS, LENGTH = (8, 5, 1), 8
GARBAGE = [7.0, -3e38, np.inf, np.nan]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def prefix(lengths, size=LENGTH):
    return jnp.arange(size)[None, :] < jnp.asarray(lengths)[:, None]


def with_garbage(x, mask, garbage):
    """Garbage off the mask, another in each entry."""
    share = jnp.arange(1, x.size + 1, dtype=jnp.float32).reshape(x.shape) / x.size
    return jnp.where(mask[..., None], x, garbage * share)


def scrambled(model, *args):
    """Parameters with nothing left at 0, so that every layer counts; compiles nothing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    generator = np.random.default_rng(1)

    def fill(path, leaf):
        base = 1.0 if path[-1].key == "scale" else 0.0
        width = 0.1 if leaf.ndim < 2 else 0.2
        return jnp.asarray(base + width * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(fill, shapes)


def conditions(mask):
    batch = len(mask)
    return {
        "label": jnp.arange(batch) % 3,
        "vector": draw(3, (batch, 3)),
        "sequence": draw(4, (batch, 4, 5)),
        "sequence_mask": prefix(1 + np.arange(batch) % 4, 4),
        "image": sequence_positions(mask, 8.0),
        "mask": mask,
    }


def some(cond, rows, size=None):
    """The condition of some examples; what has positions is cut to `size`."""
    got = {key: value[rows] for key, value in cond.items()}
    cut = {key: got[key][:, :size] for key in ("image", "mask") if key in got}
    return {**got, **cut}


def without_mask(cond):
    return {key: value for key, value in cond.items() if key != "mask"} or None


def graded(model):
    """`(params, x, t, cond) -> (output, gradients)` of a loss that is a mean over the mask."""

    def loss(params, x, t, cond):
        out = model.apply(params, x, t, cond)
        return jnp.sum(losses.masked_mean(jnp.square(out - 0.5), cond["mask"][..., None])), out

    def function(params, x, t, cond):
        grads, out = jax.grad(loss, has_aux=True)(params, x, t, cond)
        return out, grads

    return jit(function)


def assert_same_gradients(got, expected, rtol=1e-3):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(a)), path
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * np.abs(b).max() + 1e-6)
    assert np.mean([bool(np.any(leaf != 0)) for leaf in jax.tree.leaves(expected)]) > 0.9


@functools.cache
def network(told):
    """A network with its parameters, `(x, t, cond) -> output`, and a batch of mixed lengths."""
    model = UNet(**SMALL, **(TOLD if told else {}))
    mask, x, t = prefix(LENGTHS), draw(2, (3, LENGTH, 2)), jnp.array([5.0, 300.0, 900.0])
    cond = conditions(mask) if told else {"mask": mask}
    params = scrambled(model, x, 0, cond)
    return model, params, jit(functools.partial(model.apply, params)), x, t, cond


# The network


@pytest.mark.parametrize("told", [False, True])
def test_examples_of_mixed_lengths_are_what_they_are_alone(told):
    _, _, apply, x, t, cond = network(told)
    out = apply(x, t, cond)
    for i, n in ((1, 5), (2, 1)) if told else ((1, 5),):  # that of 8 is in the next test but one
        one, size = slice(i, i + 1), n + 1
        own = apply(x[one, :size], t[one], some(cond, one, size))
        np.testing.assert_allclose(out[i, :n], own[0, :n], atol=1e-5)
        assert np.abs(own[0, :n]).max() > 0.01
        assert not np.any(out[i, n:])


@pytest.mark.parametrize("told", [False, True])
def test_garbage_in_the_padding_changes_no_bit(told):
    _, _, apply, x, t, cond = network(told)
    expected = apply(x, t, cond)
    for garbage in GARBAGE:
        other = dict(cond)
        if told:
            other["image"] = with_garbage(cond["image"], cond["mask"], garbage)
        got = apply(with_garbage(x, cond["mask"], garbage), t, other)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("told", [False, True])
def test_a_full_mask_is_no_mask(told):
    _, _, apply, x, t, cond = network(told)
    out = apply(x, t, {**cond, "mask": jnp.ones((3, LENGTH), bool)})
    np.testing.assert_allclose(out, apply(x, t, without_mask(cond)), atol=1e-6)
    mixed = apply(x, t, cond)
    np.testing.assert_allclose(out[0], mixed[0], atol=1e-6)
    assert np.abs(out - mixed)[1, :5].max() > 0.01


def test_gradients_are_those_of_each_alone_and_an_empty_mask_has_none():
    fields = {**SMALL, **TOLD, "channel_multipliers": (1, 1), "attention_levels": ()}
    mask, x, t = prefix([3, 0]), draw(2, (2, LENGTH, 2)), jnp.array([5.0, 900.0])
    cond = conditions(mask)
    params = scrambled(UNet(**fields), x, 0, cond)
    function = graded(UNet(**fields, remat=True))
    out, grads = function(params, x, t, cond)
    assert not np.any(out[1])
    for garbage in GARBAGE:
        got = function(params, with_garbage(x, mask, garbage), t, cond)
        jax.tree.map(np.testing.assert_array_equal, got, (out, grads))
    own, own_grads = graded(UNet(**fields))(params, x[:1, :4], t[:1], some(cond, slice(1), 4))
    np.testing.assert_allclose(out[0, :4], own[0], atol=1e-5)
    assert_same_gradients(grads, own_grads)


def test_masks_of_two_axes():
    """A mask of any form, on a canvas that is larger or not; and garbage around it."""
    x = draw(5, (2, 6, 4, 2))
    mask = jnp.ones((2, 6, 4), bool).at[0, 4:].set(False).at[0, :, 2:].set(False)
    mask = mask.at[1, 2, 1:3].set(False).at[1, 5, 3].set(False)  # a hole and a missing corner
    model = UNet(**{**SMALL, "attention_levels": ()})
    apply = jit(functools.partial(model.apply, scrambled(model, x, 0)))
    expected = apply(x, 5.0, {"mask": mask})
    garbled = apply(with_garbage(x, mask, np.inf), 5.0, {"mask": mask})
    np.testing.assert_array_equal(garbled, expected)
    np.testing.assert_allclose(apply(x[:1, :4, :2], 5.0)[0], expected[0, :4, :2], atol=1e-5)
    wide = [(0, 0), (0, 2), (0, 4)]
    canvas, mask = jnp.pad(x, [*wide, (0, 0)], constant_values=jnp.nan), jnp.pad(mask, wide)
    out = np.asarray(apply(canvas, 5.0, {"mask": mask.astype(jnp.uint8)}))
    np.testing.assert_allclose(out[:, :6, :4], expected, atol=1e-5)
    assert not np.any(out[~np.asarray(mask)])


def test_in_bfloat16():
    x, mask = draw(2, (3, LENGTH, 2)), prefix([8, 3, 0])
    cond = conditions(mask)
    model = UNet(**ONE_LEVEL, **TOLD)
    params = scrambled(model, x, 0, cond)
    low = graded(UNet(**ONE_LEVEL, **TOLD, dtype=jnp.bfloat16))
    out, grads = low(params, x, 5.0, cond)
    assert out.dtype == jnp.float32
    expected = jit(model.apply)(params, x, 5.0, cond)
    assert 0 < np.abs(expected - out).max() / np.abs(out).max() < 0.05
    got = low(params, with_garbage(x, mask, np.nan), 5.0, cond)
    jax.tree.map(np.testing.assert_array_equal, got, (out, grads))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))


def test_a_mask_adds_no_parameters_and_does_not_touch_dropout():
    model = UNet(**ONE_LEVEL, dropout=0.5)
    x, mask = draw(0, (2, 4, 2)), jnp.ones((2, 4), bool)
    params = scrambled(model, x, 0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, 0, {"mask": mask})
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    apply = jit(functools.partial(model.apply, params))
    keys = jax.random.split(jax.random.key(1), 2)
    got, expected = (apply(x, 5, cond, dropout_keys=keys) for cond in ({"mask": mask}, None))
    np.testing.assert_allclose(got, expected, atol=1e-6)


# Its layers


def test_a_coarse_position_has_data_if_any_that_it_covers_has():
    masks = masks_of_levels(jnp.array([[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]), 3)
    expected = [[[1, 1, 0, 0], [0, 0, 1, 0]], [[1, 0], [0, 1]]]
    for mask, level in zip(masks[1:], expected, strict=True):
        np.testing.assert_array_equal(mask, level)
    assert all(mask.dtype == bool for mask in masks)
    mask = np.random.default_rng(0).random((2, 4, 6)) < 0.2
    brute = [[[m[i : i + 2, j : j + 2].any() for j in (0, 2, 4)] for i in (0, 2)] for m in mask]
    np.testing.assert_array_equal(masks_of_levels(jnp.asarray(mask), 2)[1], brute)
    assert masks_of_levels(None, 2) == [None, None]


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=7, max_size=7), st.sampled_from([0.0, 1000.0]))
def test_group_norm_counts_the_positions_of_its_mask_in_float64(row, offset):
    x = draw(0, (2, 7, 12)) + offset
    mask = np.array([row, [False] * 3 + [True] * 4])
    x = with_garbage(x, jnp.asarray(mask), -1e6)
    module = GroupNorm(num_groups=3)
    params = scrambled(module, x)
    got = np.asarray(module.apply(params, x, jnp.asarray(mask)))
    assert not np.any(got[~mask])
    scale, bias = (np.asarray(params["params"][name], np.float64) for name in ("scale", "bias"))
    for i in range(2):
        if mask[i].any():
            groups = np.asarray(x[i], np.float64)[mask[i]].reshape(-1, 3, 4)
            centred = groups - groups.mean((0, 2), keepdims=True)
            normed = centred / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-6)
            expected = normed.reshape(-1, 12) * scale + bias
            # As without a mask: an ulp of 1000 is 6e-5.
            np.testing.assert_allclose(got[i, mask[i]], expected, atol=3e-4 if offset else 5e-6)


def test_masks_that_do_not_fit_are_refused():
    x = jnp.zeros((2, 4, 3))
    for mask, got in (
        (jnp.ones((2, 4)), r"float32 of shape \(2, 4\)"),
        (jnp.ones((2, 4, 1), bool), r"bool of shape \(2, 4, 1\)"),
        (jnp.ones((2, 8), bool), r"bool of shape \(2, 8\)"),
    ):
        match = rf'cond\["mask"\] must be bools or ints of shape \(2, 4\), got {got}: 1 means'
        with pytest.raises(ValueError, match=match):
            read_condition({"mask": mask}, x)
    with pytest.raises(ValueError, match=r"mask must be None or of shape \(2, 4\), got .*\(4,\)"):
        GroupNorm().init(jax.random.key(0), x, jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"mask must be None or of shape \(2, 4\), got .*\(2, 8\)"):
        AttentionBlock().init(jax.random.key(0), x, x_mask=jnp.ones((2, 8), bool))


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.sampled_from([1.0, 7.5]))
def test_sequence_positions_say_how_far_the_ends_are(lengths, scale):
    got = np.asarray(sequence_positions(prefix(lengths, 5), scale))
    expected = np.zeros((len(lengths), 5, 4))
    for i, n in enumerate(lengths):
        for k in range(n):
            expected[i, k] = k / scale, (n - 1 - k) / scale, k == 0, k == n - 1
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    longer = jax.jit(sequence_positions, static_argnums=1)(prefix(lengths, 9), scale)
    np.testing.assert_array_equal(longer[:, :5], got)
    assert not np.any(longer[:, 5:])


def test_sequence_positions_refuse_what_does_not_fit():
    for mask in (jnp.ones((2, 3)), jnp.ones((2, 3, 1), bool), jnp.ones(3, bool)):
        with pytest.raises(ValueError, match=r"mask must be bools or ints of shape \(B, L\), got"):
            sequence_positions(mask, 4.0)
    with pytest.raises(ValueError, match=r"scale must be positive, got 0\.0"):
        sequence_positions(jnp.ones((2, 3), bool), 0.0)


# Sampling


def test_a_masked_denoiser_shows_zeros_and_predicts_zeros():
    def denoiser(x, node, *more):
        assert len(more) < 2
        mean = jnp.mean(x, axis=(1, 2), keepdims=True) + sum(jnp.sum(m) for m in more)
        return Prediction(x + mean, jnp.ones_like(x), evaluations=3)

    x, mask = draw(0, (3, 4, 2)), prefix([4, 2, 0], 4)
    node = Node(jnp.int32(0), jnp.float32(0.6), jnp.float32(0.8))
    clean = jnp.where(mask[..., None], x, 0)
    for kind in (bool, int, float):
        masked = denoisers.masked(denoiser, mask[..., None].astype(kind))
        for more in ((), (x,)):
            expected = jnp.where(mask[..., None], denoiser(clean, node, *more).x0, 0)
            for garbage in GARBAGE:
                got = masked(with_garbage(x, mask, garbage), node, *more)
                np.testing.assert_array_equal(got.x0, expected)
                np.testing.assert_array_equal(got.variance[..., 0], mask)
                assert got.evaluations == 3
    exact = denoisers.masked(denoisers.gaussian(np.zeros((4, 2)), 1.0).denoiser, mask[..., None])
    assert exact(x, node).variance is None
    for wrong in (mask, jnp.ones((2, 4, 1)), jnp.ones((1, 3, 4, 1))):
        with pytest.raises(ValueError, match=r"mask must broadcast to x \(3, 4, 2\).*mask\[..., N"):
            denoisers.masked(denoiser, wrong)(x, node)


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.ddpm()])
def test_garbage_changes_no_sample_and_each_is_what_it_is_alone(solver):
    model, params, _, _, _, cond = network(True)
    index, grid = jnp.arange(3), grids.trailing(SCHEDULE, 3)

    @jit
    def walk(x, index, cond):
        denoiser = denoisers.from_network(model.apply, params, SCHEDULE, predictions.v, cond)
        denoiser = denoisers.masked(denoiser, cond["mask"][..., None])
        keys = rng.per_example(jax.random.key(7), index)
        return sampling.walk(keys, denoiser, solver, grid, x)[0]

    keys = rng.stream(rng.per_example(jax.random.key(7), index), rng.Stream.START)
    start, mask = rng.normal(keys, (LENGTH, 2)), np.asarray(cond["mask"])
    out = np.asarray(walk(start, index, cond))
    assert np.all(np.isfinite(out))
    assert not np.any(out[~mask])
    for garbage in GARBAGE:
        other = {**cond, "image": with_garbage(cond["image"], cond["mask"], garbage)}
        got = walk(with_garbage(start, cond["mask"], garbage), index, other)
        np.testing.assert_array_equal(np.asarray(got)[mask], out[mask])
    # Noise is drawn position by position, so an example draws the same with less padding.
    short = walk(start[1:2, :6], index[1:2], some(cond, slice(1, 2), 6))
    np.testing.assert_allclose(short[0], out[1, :6], atol=1e-5)


# The loss


def test_garbage_changes_no_loss_and_each_is_what_it_is_alone():
    fields = {**TOLD, "sequence_dim": None}
    model = UNet(**{**ONE_LEVEL, "out_channels": 4}, **fields)
    mask, x0 = prefix([8, 3]), draw(6, (2, LENGTH, 2))
    cond = {key: conditions(mask)[key] for key in ("label", "vector", "image", "mask")}
    index = jnp.arange(2)
    params = scrambled(model, jnp.zeros((2, LENGTH, 4)), 0, cond)
    loss_fn = losses.denoising_loss(
        model.apply, SCHEDULE, predictions.v, cond_dropout=0.5,
        null_cond={"label": 3, "vector": 0.0}, self_condition=True, vlb_weight=0.001,
    )  # fmt: skip

    def loss(params, x0, cond, index):
        batch = {"x0": x0, "cond": cond, "mask": cond["mask"][..., None], "index": index}
        per_example, _ = loss_fn(params, jax.random.key(3), batch)
        return jnp.sum(per_example), per_example

    graded_loss = functools.partial(jit(jax.grad(loss, has_aux=True)), params)
    expected = graded_loss(x0, cond, index)
    for garbage in GARBAGE:
        other = {**cond, "image": with_garbage(cond["image"], mask, garbage)}
        got = graded_loss(with_garbage(x0, mask, garbage), other, index)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected))
    # Noise is drawn position by position, so an example draws the same with less padding.
    short = jit(loss)(params, x0[1:, :4], some(cond, slice(1, 2), 4), index[1:])[1]
    np.testing.assert_allclose(short[0], expected[1][1], rtol=1e-5)


def test_what_null_cond_does_not_name_is_kept():
    def network(params, x, noise_level, cond):
        seen.update(cond)
        return x

    def loss(null_cond):
        return losses.denoising_loss(
            network, SCHEDULE, predictions.eps, cond_dropout=0.5, null_cond=null_cond
        )

    seen, size = {}, 64
    cond = {
        "label": jnp.arange(size) % 3,
        "vector": draw(0, (size, 2)),
        "mask": prefix([4, 2] * (size // 2), 4),
    }
    batch = {"x0": jnp.zeros((size, 4, 1)), "cond": cond}
    loss({"label": 3, "vector": jnp.zeros(2)})(None, jax.random.key(0), batch)
    np.testing.assert_array_equal(seen["mask"], cond["mask"])
    dropped = np.asarray(seen["label"]) == 3
    assert 0 < dropped.sum() < size
    np.testing.assert_array_equal(seen["label"], np.where(dropped, 3, cond["label"]))
    vector = np.where(dropped[:, None], 0, cond["vector"])
    np.testing.assert_array_equal(seen["vector"], vector)

    whole = {"label": 3, "vector": jnp.zeros(2), "mask": jnp.ones(4, bool)}
    got = dict(seen)
    loss(whole)(None, jax.random.key(0), batch)
    np.testing.assert_array_equal(got["label"], seen["label"])  # the same are dropped
    for wrong in ({}, {"lable": 3}, {"label": 3, "image": 0.0}):
        with pytest.raises(ValueError, match=r"of some of its keys.*'label'.*'mask'.*got"):
            loss(wrong)(None, jax.random.key(0), batch)
