"""Conditions: what is read and refused, cross-attention, and that the UNet hears all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff.models import AttentionBlock, Condition, GroupNorm, UNet, read_condition

# One level, and attention in the middle only, compile quickly.
SMALL = dict(
    out_channels=2, channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_levels=()
)
FIELDS = dict(num_classes=4, vector_dim=3, sequence_dim=5, image_channels=1)
MASK = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conditions(spatial, batch=3, seed=7):
    return {
        "label": jnp.arange(batch) % 4,
        "vector": jnp.asarray(draw(seed, (batch, 3))),
        "sequence": jnp.asarray(draw(seed + 1, (batch, 4, 5))),
        "sequence_mask": jnp.asarray(MASK)[:batch],
        "image": jnp.asarray(draw(seed + 2, (batch, *spatial, 1))),
    }


def scrambled(model, *args):
    """Parameters with nothing left at 0, so that every layer counts; compiles nothing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        base = 1.0 if path[-1].key == "scale" else 0.0
        width = 0.1 if leaf.ndim < 2 else 0.2
        return jnp.asarray(base + width * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(fill, shapes)


# Cross-attention


def reference(params, x, tokens, mask, heads):
    """Cross-attention in float64, over the tokens that count alone, example by example."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    normed = GroupNorm().apply({"params": params["params"]["norm"]}, x)
    out = np.array(x, np.float64)
    for i, kept in enumerate(np.asarray(mask, bool)):
        if not kept.any():
            continue
        h = np.asarray(normed[i], np.float64).reshape(-1, x.shape[-1])
        chosen = np.asarray(tokens[i], np.float64)[kept]
        q, k, v = (
            (y @ p[n]["kernel"] + p[n]["bias"]).reshape(len(y), heads, -1)
            for n, y in (("query", h), ("key", chosen), ("value", chosen))
        )
        weights = np.exp(np.einsum("thd,lhd->htl", q, k) / np.sqrt(q.shape[-1]))
        weights /= weights.sum(-1, keepdims=True)
        h = np.einsum("htl,lhd->thd", weights, v).reshape(h.shape)
        out[i] += (h @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape[1:])
    return out


@functools.cache
def cross(spatial, heads):
    x, tokens = jnp.asarray(draw(0, (3, *spatial, 8))), jnp.asarray(draw(1, (3, 4, 5)))
    module = AttentionBlock(num_heads=heads)
    params = scrambled(module, x, tokens)
    return params, x, tokens, jax.jit(module.apply)


@given(
    mask=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3),
    garbage=st.sampled_from([0.0, 1e30, np.inf, np.nan]),
    case=st.sampled_from([((6,), 1), ((2, 3), 4)]),
)
def test_cross_attention_is_a_softmax_over_the_tokens_that_count(mask, garbage, case):
    params, x, tokens, apply = cross(*case)
    mask = jnp.asarray(mask)
    got = apply(params, x, jnp.where(mask[:, :, None], tokens, garbage), mask)
    np.testing.assert_allclose(got, reference(params, x, tokens, mask, case[1]), atol=1e-5)
    # Bit for bit: what stands in masked tokens is not seen, and no token at all is nothing at all.
    np.testing.assert_array_equal(got, apply(params, x, tokens, mask))
    none = ~np.asarray(mask).any(1)
    np.testing.assert_array_equal(got[none], x[none])


def test_no_mask_means_that_all_tokens_count_and_one_of_ints_is_one_of_bools():
    params, x, tokens, apply = cross((6,), 1)
    expected = reference(params, x, tokens, np.ones((3, 4)), 1)
    np.testing.assert_allclose(apply(params, x, tokens), expected, atol=1e-5)
    by_bools = apply(params, x, tokens, jnp.asarray(MASK, bool))
    np.testing.assert_array_equal(apply(params, x, tokens, jnp.asarray(MASK)), by_bools)


def test_cross_attention_does_not_see_the_order_of_tokens():
    params, x, tokens, apply = cross((6,), 1)
    mask, order = jnp.asarray(MASK), jnp.array([2, 0, 3, 1])
    got = apply(params, x, tokens[:, order], mask[:, order])
    np.testing.assert_allclose(got, apply(params, x, tokens, mask), atol=1e-6)
    moved = apply(params, x, tokens[:, order], mask)  # now other tokens count
    assert np.abs(moved - got).max() > 0.01


def test_gradients_are_finite_where_tokens_are_masked_or_none_is_left():
    params, x, tokens, apply = cross((6,), 1)
    mask = jnp.asarray([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    garbage = jnp.where(mask[:, :, None] == 1, tokens, jnp.nan)

    def loss(params, x, tokens):
        return jnp.sum(jnp.square(apply(params, x, tokens, mask)))

    of_params, of_x, of_tokens = jax.grad(loss, (0, 1, 2))(params, x, garbage)
    for leaf in jax.tree.leaves((of_params, of_x, of_tokens)):
        assert np.all(np.isfinite(leaf))
    np.testing.assert_array_equal(of_x[0], 2 * x[0])
    heard = np.any(np.asarray(of_tokens) != 0, axis=-1)
    np.testing.assert_array_equal(heard, np.asarray(mask) == 1)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (None, (2, 4), "mask must be None where there are no tokens"),
        ((2, 0, 3), None, r"tokens must be of shape \(2, L, D\) with L at least 1, got .*mask"),
        ((3, 4, 3), None, r"tokens must be of shape \(2, L, D\).* got shape \(3, 4, 3\)"),
        ((2, 3), None, "tokens must be of shape"),
        ((2, 4, 3), (2, 3), r"mask must be None or of shape \(2, 4\), got shape \(2, 3\): give"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens, mask, message):
    tokens, mask = (None if shape is None else jnp.zeros(shape) for shape in (tokens, mask))
    with pytest.raises(ValueError, match=message):
        AttentionBlock().init(jax.random.key(0), jnp.zeros((2, 4, 8)), tokens, mask)


# The UNet


@pytest.fixture(scope="module")
def told():
    model = UNet(**SMALL, **FIELDS)
    x, cond = jnp.asarray(draw(2, (3, 4, 2))), conditions((4,))
    params = scrambled(model, x, 0, cond)
    return params, x, cond, jax.jit(model.apply)


@pytest.mark.parametrize("spatial", [(4,), (2, 4), (2, 2, 2)])
def test_every_condition_is_heard_by_its_example_alone(spatial):
    model = UNet(**SMALL, **FIELDS)
    x, cond = jnp.asarray(draw(2, (3, *spatial, 2))), conditions(spatial)
    apply = jax.jit(functools.partial(model.apply, scrambled(model, x, 0, cond)))
    out = apply(x, 5, cond)
    assert out.shape == (3, *spatial, 2)
    other = {**conditions(spatial, seed=20), "label": cond["label"][::-1] + 1}
    other["sequence_mask"] = 1 - cond["sequence_mask"].at[1, 0].set(0)
    for key, value in cond.items():
        altered = apply(x, 5, {**cond, key: value.at[1].set(other[key][1])})
        assert np.abs(altered - out)[1].max() > 1e-3, key
        np.testing.assert_array_equal(altered[::2], out[::2], err_msg=key)


def test_masked_tokens_are_not_seen(told):
    params, x, cond, apply = told
    out = apply(params, x, 5, cond)
    counts = cond["sequence_mask"][:, :, None] == 1
    for garbage in (7.0, jnp.inf, jnp.nan):
        altered = {**cond, "sequence": jnp.where(counts, cond["sequence"], garbage)}
        np.testing.assert_array_equal(apply(params, x, 5, altered), out)
    padding = jnp.full((3, 3, 5), jnp.nan)
    longer = {
        **cond,
        "sequence": jnp.concatenate([cond["sequence"], padding], axis=1),
        "sequence_mask": jnp.pad(cond["sequence_mask"], ((0, 0), (0, 3))),
    }
    np.testing.assert_allclose(apply(params, x, 5, longer), out, atol=1e-5)


def test_a_sequence_without_tokens_is_a_network_without_sequences(told):
    params, x, cond, apply = told
    none = {**cond, "sequence_mask": jnp.zeros((3, 4), bool)}
    plain = UNet(**SMALL, **{**FIELDS, "sequence_dim": None})
    rest = {key: value for key, value in cond.items() if "sequence" not in key}
    expected = jax.jit(plain.apply)(params, x, 5, rest)  # it does not look at the parameters left
    np.testing.assert_allclose(apply(params, x, 5, none), expected, atol=1e-5)
    assert np.abs(apply(params, x, 5, cond) - expected).max() > 0.01


def test_a_bare_array_means_labels():
    model = UNet(**SMALL, num_classes=3)
    x, labels = jnp.asarray(draw(0, (3, 4, 2))), jnp.array([2, 0, 1])
    apply = jax.jit(functools.partial(model.apply, scrambled(model, x, 0, labels)))
    expected = apply(x, 5, {"label": labels})
    for cond in (labels, labels.astype(jnp.uint8), {"label": labels, "image": None}):
        np.testing.assert_array_equal(apply(x, 5, cond), expected)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_labels_out_of_range_give_nan(num_classes):
    model = UNet(**SMALL, num_classes=num_classes)
    x, labels = jnp.asarray(draw(0, (3, 2, 2))), jnp.array([-1, 0, num_classes])
    out = jax.jit(model.apply)(scrambled(model, x, 0, labels), x, 5, labels)
    assert np.isnan(out).all(axis=(1, 2)).tolist() == [True, False, True]
    assert np.all(np.isfinite(out[1]))


def test_conditions_add_parameters_and_leave_the_others_be():
    x = jax.ShapeDtypeStruct((3, 4, 2), jnp.float32)

    def start(**fields):
        # Keys of this kind compile quickly. The image alone may widen a layer, the first.
        key = jax.random.key(0, impl="unsafe_rbg")
        cond = {k: v for k, v in conditions((4,)).items() if k not in ("sequence_mask", "image")}
        model = UNet(**SMALL, **fields)
        return jax.jit(model.init)(key, jnp.zeros(x.shape), 0, cond if fields else None)["params"]

    plain, more = start(), start(num_classes=4, vector_dim=3, sequence_dim=5)
    assert set(more) - set(plain) == {
        *("label_embedding", "vector_embedding_0", "vector_embedding_1", "mid_cross_attention"),
    }
    jax.tree.map(np.testing.assert_array_equal, plain, {name: more[name] for name in plain})
    assert not np.any(more["mid_cross_attention"]["out"]["kernel"])
    assert more["mid_cross_attention"]["key"]["kernel"].shape == (5, 8)


def test_every_attention_is_followed_by_one_to_the_tokens():
    cond = {"sequence": jnp.zeros((1, 4, 5))}
    fields = {**SMALL, "channel_multipliers": (1, 2), "attention_levels": (1,)}
    model = UNet(**fields, sequence_dim=5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 2)), 0, cond)
    names = {name for name in shapes["params"] if "attention" in name}
    selfs = {"down_1_attention_0", "mid_attention", "up_1_attention_0", "up_1_attention_1"}
    assert names == selfs | {name.replace("attention", "cross_attention") for name in selfs}


def test_gradients_with_remat_are_right_and_see_no_masked_token(told):
    params, x, cond, apply = told
    cond = {**cond, "sequence_mask": cond["sequence_mask"].at[0].set(0)}  # one has no token left
    model = UNet(**SMALL, **FIELDS, remat=True)

    def loss(model_apply, params, tokens):
        out = model_apply(params, x, 5, {**cond, "sequence": tokens})
        return jnp.mean(jnp.square(out))

    grad = jax.jit(jax.grad(functools.partial(loss, model.apply)))
    counts = cond["sequence_mask"][:, :, None] == 1
    grads = grad(params, jnp.where(counts, cond["sequence"], jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, grads, grad(params, cond["sequence"]))
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(np.asarray(leaf) != 0), path

    # Along its gradient a function changes by the norm of it; `apply` is a network without remat.
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    moved = [
        loss(
            apply, jax.tree.map(lambda p, g, h=h: p + h / norm * g, params, grads), cond["sequence"]
        )
        for h in (-1e-3, 1e-3)
    ]
    np.testing.assert_allclose((moved[1] - moved[0]) / 2e-3, norm, rtol=1e-2)


def test_bfloat16_hears_the_same(told):
    params, x, cond, apply = told
    low = jax.jit(UNet(**SMALL, **FIELDS, dtype=jnp.bfloat16).apply)
    shapes = jax.eval_shape(low, params, x, 5, cond)
    assert shapes.dtype == jnp.float32
    got, expected = low(params, x, 5, cond), apply(params, x, 5, cond)
    assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


def test_conditions_are_learned_from_the_initialisation():
    """Each channel of the target can be known from one condition alone; x is noise."""
    model = UNet(**{**SMALL, "out_channels": 4}, **FIELDS)
    mask = jnp.asarray(MASK * 16)

    def batch(key):
        keys = jax.random.split(key, 5)
        x = jax.random.normal(keys[0], (48, 4, 1))
        cond = {
            "label": jax.random.randint(keys[1], (48,), 0, 4),
            "vector": jax.random.normal(keys[2], (48, 3)),
            "sequence": jax.random.normal(keys[3], (48, 4, 5)),
            "sequence_mask": mask,
            "image": jax.random.normal(keys[4], (48, 4, 1)),
        }
        mean = jnp.sum(cond["sequence"][:, :, 0] * mask, 1) / jnp.sum(mask, 1)
        each = jnp.stack([cond["label"] - 1.5, cond["vector"][:, 1], mean * 1.6], axis=-1)
        each = jnp.broadcast_to(each[:, None, :], (48, 4, 3))
        return x, cond, jnp.concatenate([each, cond["image"]], axis=-1)

    def losses(params, key):
        x, cond, target = batch(key)
        error = jnp.mean(jnp.square(model.apply(params, x, 0, cond) - target), axis=(0, 1))
        return jnp.sum(error), error / jnp.var(target, axis=(0, 1))

    optimizer = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        grads, unexplained = jax.grad(losses, has_aux=True)(params, key)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), unexplained

    @jax.jit
    def train(key):
        first, rest = jax.random.split(key)
        x, cond, _ = batch(jax.random.key(3))
        params = model.init(first, x, 0, cond)
        carry = (params, optimizer.init(params))
        return jax.lax.scan(step, carry, jax.random.split(rest, 60))[1]

    unexplained = train(jax.random.key(0, impl="unsafe_rbg"))
    np.testing.assert_allclose(unexplained[0], 1.0, atol=0.1)  # the output is 0 at first
    assert np.all(np.mean(unexplained[-10:], axis=0) < 0.3), unexplained[-1]


def test_x_may_carry_more_channels_than_the_output_and_fewer():
    for channels in (4, 1):  # self-conditioning; learned variance
        x = jnp.asarray(draw(0, (2, 4, channels)))
        model = UNet(**SMALL)
        apply = jax.jit(functools.partial(model.apply, scrambled(model, x, 0)))
        out, altered = apply(x, 5), apply(x.at[:, :, -1].add(1.0), 5)
        assert out.shape == (2, 4, 2)
        assert np.abs(altered - out).max() > 0.01


# Errors


def test_reads_what_is_declared_and_leaves_the_rest_none():
    x, cond = jnp.zeros((3, 4, 2)), {**conditions((4,)), "mask": jnp.ones((3, 4), bool)}
    assert read_condition(None, x) == Condition()
    assert read_condition({}, x) == read_condition({"image": None}, x) == Condition()
    got = read_condition(cond, x, **FIELDS)
    assert got._asdict().keys() == cond.keys()
    for key, value in cond.items():
        np.testing.assert_array_equal(getattr(got, key), value)
    for key, value in read_condition(got, x, **FIELDS)._asdict().items():
        np.testing.assert_array_equal(value, cond[key])
    assert read_condition({**cond, "sequence_mask": None}, x, **FIELDS).sequence_mask is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lable": 0},
            "the keys of cond must be among label, .*, got 'lable': did you mean 'label'",
        ),
        ({"zzz": 0}, "the keys of cond must be .*, got 'zzz': leave it out"),
        (
            {"label": None},
            r'cond\["label"\] must be int labels of shape \(3,\) as num_classes is 4',
        ),
        ({"label": jnp.zeros(3)}, r"int labels of shape \(3,\), got float32 of shape \(3,\): pass"),
        ({"label": jnp.zeros(3, bool)}, "int labels .* got bool"),
        ({"label": jnp.zeros((3, 1), int)}, r"int labels .* got int32 of shape \(3, 1\)"),
        ({"label": 1}, r"int labels of shape \(3,\), got int32 of shape \(\)"),
        (
            {"vector": None},
            r'"vector"\] must be floats of shape \(3, 3\) as vector_dim is 3, got No',
        ),
        ({"vector": jnp.zeros((3, 2))}, r"floats of shape \(3, 3\), got float32 of shape \(3, 2\)"),
        ({"vector": jnp.zeros(3)}, r"floats of shape \(3, 3\), got .*: pass one vector"),
        ({"vector": jnp.zeros((1, 3))}, r"floats of shape \(3, 3\), got"),
        ({"vector": jnp.zeros((3, 3), int)}, r"floats of shape \(3, 3\), got int32"),
        ({"vector": jnp.zeros((3, 3), complex)}, r"floats of shape \(3, 3\), got complex64"),
        (
            {"sequence": None},
            r"of shape \(3, L, 5\) as sequence_dim is 5, got None.*dict with label",
        ),
        ({"sequence": jnp.zeros((3, 5))}, r"floats of shape \(3, L, 5\), got float32 .*: pad"),
        ({"sequence": jnp.zeros((3, 0, 5))}, r"floats of shape \(3, L, 5\), got .*at least 1"),
        ({"sequence": jnp.zeros((3, 4, 6))}, r"floats of shape \(3, 4, 5\), got"),
        ({"sequence": jnp.zeros((2, 4, 5))}, r"floats of shape \(3, 4, 5\), got"),
        ({"sequence": jnp.zeros((3, 4, 5), int)}, "floats of .* got int32"),
        ({"sequence_mask": jnp.zeros((3, 5), int)}, r"bools or ints of shape \(3, 4\), got"),
        ({"sequence_mask": jnp.zeros((3, 4))}, "bools or ints of .*, got float32.*`mask > 0.5`"),
        ({"image": None}, r"floats of shape \(3, 4, 6, 1\) as image_channels is 1, got None"),
        ({"image": jnp.zeros((3, 2, 3, 1))}, r"\(3, 4, 6, 1\), got .*\(3, 2, 3, 1\).*resize"),
        ({"image": jnp.zeros((3, 4, 6, 3))}, r"\(3, 4, 6, 1\), got .*\(3, 4, 6, 3\)"),
        ({"image": jnp.zeros((3, 4, 6, 1), jnp.uint8)}, r"floats of .*, got uint8.*scale it"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change, message):
    cond = {**conditions((4, 6)), **change}
    with pytest.raises(ValueError, match=message):
        read_condition(cond, jnp.zeros((3, 4, 6, 2)), **FIELDS)


@pytest.mark.parametrize("key", ["label", "vector", "sequence", "sequence_mask", "image"])
def test_what_the_network_does_not_declare_is_refused(key):
    field = {"label": "num_classes", "image": "image_channels", "vector": "vector_dim"}
    field = field.get(key, "sequence_dim")
    message = rf'cond\["{key}"\] must be None, got .*: leave it out, or set {field}'
    with pytest.raises(ValueError, match=message):
        read_condition({key: conditions((4,))[key]}, jnp.zeros((3, 4, 2)))


def test_a_bare_array_for_a_network_of_other_conditions_is_refused():
    x = jnp.zeros((3, 4, 2))
    with pytest.raises(ValueError, match=r"cond must be None, got labels.*come in a dict"):
        read_condition(jnp.zeros((3, 3)), x, vector_dim=3)
    with pytest.raises(ValueError, match=r'cond\["vector"\] must be .* a dict with label, vector'):
        read_condition(jnp.zeros(3, int), x, num_classes=4, vector_dim=3)


@pytest.mark.parametrize("field", ["num_classes", "vector_dim", "sequence_dim", "image_channels"])
def test_fields_that_declare_nothing_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be None or at least 1, got 0"):
        jax.eval_shape(UNet(**SMALL, **{field: 0}).init, jax.random.key(0), jnp.zeros((1, 4, 1)), 0)


def test_the_network_refuses_at_the_call(told):
    params, x, cond, apply = told
    with pytest.raises(ValueError, match=r'cond\["image"\] must be floats'):
        apply(params, x, 5, {**cond, "image": cond["image"][:, :2]})
    with pytest.raises(ValueError, match=r"int labels of shape \(3,\) as num_classes is 4"):
        apply(params, x, 5)
