"""A batch in parts: the numbers of the whole, in the memory of a part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff import losses, predictions, schedules, timesteps
from jaxdiff.training import ema, init_state, make_train_step, microbatches

SCHEDULE = schedules.linear(100, 1e-3, 0.1)
BATCH = 32
SHAPE = (6, 2)
numbers = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(numbers.normal(size=shape), jnp.float32)


PARAMS = {"w": normal(2, 8), "v": normal(3, 8), "out": normal(8, 2)}
# Conditions and a mask of each example, as those of sequences.
BATCHES = [
    {
        "x0": normal(BATCH, *SHAPE),
        "cond": {"vector": normal(BATCH, 3), "mask": numbers.random((BATCH, 6)) < 0.7},
        "mask": numbers.random((BATCH, 6, 1)) < 0.7,
    }
    for _ in range(4)
]


def network(params, x, noise_level, cond):
    hidden = x @ params["w"] + (cond["vector"] @ params["v"])[:, None]
    hidden = jnp.sin(hidden + noise_level[:, None, None] / 100)
    return jnp.where(cond["mask"][..., None], hidden, 0) @ params["out"]


def loss_fn(params, key, batch):
    """A denoising loss that is quick to compile: what is drawn is a hash of key and index."""
    drawn = (7919 * batch["index"] + (jax.random.key_data(key)[-1] % 1000).astype(int)) % 1009
    eps = jnp.sin((drawn[:, None, None] * jnp.arange(1, 13).reshape(1, *SHAPE)).astype(float))
    t = drawn % 100
    output = network(params, batch["x0"] + eps, t, batch["cond"])
    mask = jnp.broadcast_to(batch["mask"], output.shape)
    loss = jnp.sum(jnp.where(mask, jnp.square(output - eps), 0), (1, 2)) / (
        1 + jnp.sum(mask, (1, 2))
    )
    past = batch["history"]["loss"] if "history" in batch else jnp.ones(3)
    return loss * jnp.mean(past), {"t": t, "loss": loss}


def watch(per_example, aux):
    early = (aux["t"] < 50).astype(jnp.float32)
    early = jnp.stack([early, 1 - early])
    return {"sums": early @ per_example, "counts": jnp.sum(early, 1)}


def run(parts, optimizer=None, axis_name=None, compiled=jax.jit, place=lambda tree: tree):
    # Plain gradient descent: what the parameters move by is the gradient itself.
    optimizer = optimizer or optax.sgd(0.1)
    history = {"t": jnp.zeros(BATCH, int), "loss": jnp.ones(BATCH)}
    state = init_state(PARAMS, optimizer, history=history, averages=("p",))
    step = make_train_step(
        loss_fn, optimizer, ema.warmup(0.9), axis_name, key=jax.random.key(3),
        update_history=lambda past, t, loss: {"t": t, "loss": (past["loss"] + loss) / 2},
        microbatches=parts, watch=watch, averages={"p": ema.power(0.1)},
    )  # fmt: skip
    step, metrics = compiled(step), []
    for batch in BATCHES:
        state, values = step(state, place(batch))
        metrics.append(jax.device_get(values))
    return state, metrics


def assert_same(got, expected):
    """Checks that metrics, histories and parameters are the same to 1e-6."""
    for a, b in zip(got[1], expected[1], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6)
    (got, _), (expected, _) = got, expected
    for tree in ("params", "ema", "averages"):
        for a, b, start in zip(
            *map(jax.tree.leaves, (getattr(got, tree), getattr(expected, tree), PARAMS)),
            strict=True,
        ):
            assert np.linalg.norm(b - start) > 0.02 * np.linalg.norm(start)
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
    # Each example in its own place.
    for a, b in zip(*map(jax.tree.leaves, (got.history, expected.history)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.fixture(scope="module")
def whole():
    return run(1)


@pytest.mark.parametrize("parts", [4, 32])
def test_parts_equal_the_whole_to_rounding(whole, parts):
    assert_same(run(parts), whole)


def test_what_is_watched_is_summed_over_the_whole_batch(whole):
    for values in whole[1]:
        assert values["counts"].sum() == BATCH
        assert (values["counts"] > 0).all()
        np.testing.assert_allclose(values["sums"].sum() / BATCH, values["loss"], rtol=1e-6)


def rows(tree):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def in_shard_map(step):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    both = PartitionSpec(("data", "fsdp"))
    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), both), out_specs=PartitionSpec())
    )


def on_mesh(step):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))


@pytest.mark.parametrize(
    "options",
    [
        {"compiled": on_mesh, "place": rows},
        {"compiled": in_shard_map, "axis_name": ("data", "fsdp")},
    ],
    ids=["mesh", "shard_map"],
)
def test_parts_of_a_batch_over_devices_equal_the_whole(whole, options):
    assert_same(run(4, **options), whole)


def test_parts_equal_the_whole_under_pmap(whole):
    state = init_state(PARAMS, optax.sgd(0.1), ema=False)
    step = make_train_step(
        loss_fn, optax.sgd(0.1), axis_name="data", key=jax.random.key(3), microbatches=4,
        watch=watch,
    )  # fmt: skip
    batch = jax.tree.map(lambda a: a.reshape(8, 4, *a.shape[1:]), BATCHES[0])
    state = jax.tree.map(lambda a: jnp.stack([a] * 8), state)
    _, got = jax.pmap(step, axis_name="data")(state, batch)
    for name, values in whole[1][0].items():
        np.testing.assert_allclose(got[name][5], values, rtol=1e-6)


def test_a_divided_batch_stays_where_it_is():
    # Every device computes its own rows of every part: only sums over devices are communicated.
    state = init_state(PARAMS, optax.sgd(0.1), ema=False)
    step = make_train_step(loss_fn, optax.sgd(0.1), microbatches=4, watch=watch)
    text = jax.jit(step).lower(state, rows(BATCHES[0])).compile().as_text()
    assert "all-reduce" in text
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text


def test_microbatches_within_accumulated_batches():
    expected = run(1, optax.MultiSteps(optax.sgd(0.1), 2))
    assert_same(run(4, optax.MultiSteps(optax.sgd(0.1), 2)), expected)


def test_the_denoising_loss_in_parts():
    full = losses.denoising_loss(
        network, SCHEDULE, predictions.v, timesteps=timesteps.stratified(BATCH), cond_dropout=0.2,
        null_cond={"vector": np.zeros(3, np.float32)},
    )  # fmt: skip
    state = init_state(PARAMS, optax.sgd(0.1), ema=False)
    whole, parts = (
        jax.jit(make_train_step(full, optax.sgd(0.1), microbatches=k))(state, BATCHES[0])[1]
        for k in (1, 4)
    )
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-6)


def test_one_part_that_is_not_finite_skips_the_whole_batch():
    optimizer = optax.adam(1e-2)
    state = init_state(PARAMS, optimizer, ema=False, skip_nonfinite=True, averages=("p",))
    step = make_train_step(
        loss_fn, optimizer, microbatches=4, skip_nonfinite=True, averages={"p": 0.5}
    )
    x0 = BATCHES[0]["x0"].at[5].set(jnp.nan)
    after, metrics = jax.jit(step)(
        state, {**BATCHES[0], "x0": x0, "mask": np.ones((1, 1, 1), bool)}
    )
    assert int(metrics["skipped"]) == 1
    for part in ("params", "opt_state", "averages"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))


def test_what_is_the_same_for_all_examples_is_not_divided():
    def mean_loss(params, key, batch):
        loss = params * jnp.mean(jnp.where(batch["mask"], batch["x0"], 0), axis=(1, 2))
        return jnp.mean(loss) * batch["history"].sum(), (loss, {})

    batch = {"x0": BATCHES[0]["x0"], "cond": None, "history": jnp.ones(3)}
    mask = jnp.arange(6)[:, None] < 4
    expected = 3 * jnp.mean(jnp.where(mask[None], batch["x0"], 0))
    for given in (mask[None], jnp.broadcast_to(mask, (BATCH, 6, 1))):
        value_and_grad = microbatches.value_and_grad(mean_loss, 4)
        (loss, (rows, _)), grads = value_and_grad(
            jnp.float32(1), jax.random.key(0), {**batch, "mask": given}
        )
        np.testing.assert_allclose([loss, grads, 3 * rows.mean()], expected, rtol=1e-6)
    with jax.numpy_rank_promotion("allow"):
        (loss, _), _ = value_and_grad(jnp.float32(1), jax.random.key(0), {**batch, "mask": mask})
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_it_takes_the_memory_of_a_part():
    def wide(params, key, batch):
        hidden = jnp.tanh(batch["x0"][..., None] * params)  # 1000 times the batch, kept for later
        return jnp.sum(jnp.sin(hidden), axis=(1, 2)), {}

    def temporaries(parts):
        optimizer = optax.sgd(0.1)
        step = make_train_step(wide, optimizer, microbatches=parts)
        state = init_state(jnp.ones((1, 1, 1000)), optimizer, ema=False)
        compiled = jax.jit(step).lower(state, {"x0": jnp.ones((256, 10))}).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 6


def test_gradients_are_accumulated_in_float32():
    def mean_loss(params, key, batch):
        return jnp.mean(batch["x0"] * params["w"].astype(jnp.float32)), (None, {})

    parts = 512  # in bfloat16 256 + 1 is 256
    params = {"w": jnp.ones((), jnp.bfloat16)}
    value_and_grad = microbatches.value_and_grad(mean_loss, parts)
    (loss, _), grads = value_and_grad(params, jax.random.key(0), {"x0": jnp.ones(parts)})
    assert loss == 1
    assert grads["w"].dtype == jnp.bfloat16
    assert grads["w"] == 1


def test_bad_arguments_are_refused():
    def step(parts, batch, **options):
        state = init_state(PARAMS, optax.sgd(0.1), ema=False)
        step = make_train_step(loss_fn, optax.sgd(0.1), microbatches=parts, **options)
        return jax.eval_shape(step, state, batch)

    for parts in (0, -1):
        with pytest.raises(ValueError, match="microbatches must be at least 1"):
            step(parts, BATCHES[0])
    with pytest.raises(ValueError, match=r"batch of 32 examples .* divide into microbatches=5"):
        step(5, BATCHES[0])
    with pytest.raises(ValueError, match=r"\['cond'\]\['vector'\] must have 32 rows.*\(1, 3\)"):
        step(2, {**BATCHES[0], "cond": {**BATCHES[0]["cond"], "vector": jnp.ones((1, 3))}})
    with pytest.raises(ValueError, match=r"other names than \['grad_norm', 'loss', .*got \['loss'"):
        step(2, BATCHES[0], watch=lambda per_example, aux: {"loss": jnp.sum(per_example)})
