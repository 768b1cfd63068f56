"""Losses that depend on past losses: one history, however the step is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff import losses, predictions, schedules, timesteps
from jaxdiff.training import checkpoints, ema, init_state, make_train_step

SCHEDULE = schedules.linear(10, 1e-2, 0.4)
SAMPLER = timesteps.loss_aware(3)
BATCH = 16
STEPS = 10
DATA = np.random.default_rng(0).normal(size=(STEPS, BATCH, 3)).astype(np.float32)
PARAMS = {"w": jnp.full(3, 0.3, jnp.float32), "b": jnp.zeros(3)}


def network(params, x, noise_level, cond):
    return params["w"][None] * x + params["b"][None] * noise_level[:, None] / 10


loss_fn = losses.denoising_loss(network, SCHEDULE, predictions.eps, timesteps=SAMPLER)


def setup(axis_name=None, optimizer=None):
    optimizer = optimizer or optax.adam(1e-2)
    step = make_train_step(
        loss_fn, optimizer, ema.warmup(0.9), axis_name,
        key=jax.random.key(3), update_history=SAMPLER.update,
    )  # fmt: skip
    return init_state(jax.tree.map(jnp.copy, PARAMS), optimizer, history=SAMPLER.init(10)), step


def run(step, state, place=lambda x: x, data=DATA):
    for x0 in data:
        state, _ = step(state, place({"x0": jnp.asarray(x0)}))
    return state


def run_jit(data=DATA, state=None):
    first, step = setup()
    return run(jax.jit(step, donate_argnums=0), first if state is None else state, data=data)


def run_mesh():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    state, step = setup()
    step = jax.jit(step, donate_argnums=0)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    state = run(step, state, lambda batch: jax.device_put(batch, rows))
    assert step._cache_size() == 1  # the history comes back on the sharding it had
    return state


def run_shard_map(shape, names):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
    state, step = setup(names if len(names) > 1 else names[0])
    rows = PartitionSpec(names)
    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec()
        ),
        donate_argnums=0,
    )  # fmt: skip
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    state = run(step, state, lambda batch: jax.device_put(batch, NamedSharding(mesh, rows)))
    assert step._cache_size() == 1
    return state


def run_pmap():
    state, step = setup("data")
    step = jax.pmap(step, axis_name="data", donate_argnums=0)
    state = jax.tree.map(lambda a: jnp.stack([a] * 8), state)
    state = run(step, state, lambda batch: {"x0": batch["x0"].reshape(8, -1, 3)})
    for leaf in jax.tree.leaves(state.history):  # the same on all devices
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda a: a[0], state)


@pytest.fixture(scope="module")
def reference():
    return run_jit()


def assert_same_history(got, expected):
    np.testing.assert_array_equal(got.counts, expected.counts)
    # In the same places: the same times were drawn in the same order.
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-4)
    assert len(np.unique(np.asarray(expected.losses))) == expected.losses.size


def test_the_history_is_that_of_the_definition(reference):
    # The steps against what the loss function draws and the sampler's update of it, one by one.
    @jax.jit
    def by_hand(params, key, x0, history):
        batch = {"x0": x0, "index": jnp.arange(BATCH), "history": history}
        weighted, aux = loss_fn(params, key, batch)
        history = SAMPLER.update(history, aux["t"], aux["loss"])
        return weighted, jnp.all(weighted != aux["loss"]), history

    state, step = setup()
    step, history, full = jax.jit(step), state.history, []
    for number, x0 in enumerate(DATA):
        key = jax.random.fold_in(jax.random.key(3), number)
        weighted, is_full, history = by_hand(state.params, key, x0, history)
        full.append(bool(is_full))
        state, metrics = step(state, {"x0": jnp.asarray(x0)})
        np.testing.assert_allclose(metrics["loss"], weighted.mean(), rtol=1e-5)
        assert set(metrics) == {"loss", "grad_norm", "param_norm"}
        np.testing.assert_array_equal(state.history.counts, history.counts)
        np.testing.assert_allclose(state.history.losses, history.losses, rtol=1e-5)
    assert not full[0]  # some steps with the empty history, some with the full one
    assert sum(full) >= 3
    assert_same_history(reference.history, history)


@pytest.mark.parametrize(
    "other",
    [
        run_mesh,
        lambda: run_shard_map((8,), ("data",)),
        lambda: run_shard_map((2, 4), ("data", "fsdp")),
        run_pmap,
    ],
    ids=["mesh", "shard_map", "shard_map over two axes", "pmap"],
)
def test_every_way_to_run_gives_the_same_history(reference, other):
    state = other()
    assert_same_history(state.history, reference.history)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, reference.params
    )


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(reference, tmp_path):
    with checkpoints.open_folder(tmp_path) as saved:
        before = run_jit(DATA[:6])
        checkpoints.save(saved, before, data=None, config={})
        state = checkpoints.restore(saved, setup()[0]).state
        assert jax.tree.structure(state) == jax.tree.structure(before)
        jax.tree.map(np.testing.assert_array_equal, state, before)
        assert state.history.counts.dtype == jnp.int32
    again = run_jit(DATA[6:], state)
    jax.tree.map(np.testing.assert_array_equal, again, reference)


def test_accumulation_gives_the_history_of_the_large_batch(reference, tmp_path):
    state, step = setup(optimizer=optax.MultiSteps(optax.adam(1e-2), 4))
    step = jax.jit(step, donate_argnums=0)
    for number, x0 in enumerate(DATA):
        for part in x0.reshape(4, 4, 3):
            seen = jax.tree.map(np.array, state.history.now)
            state, _ = step(state, {"x0": jnp.asarray(part)})
            if int(state.opt_state.mini_step):  # all microbatches of an update draw by the same
                jax.tree.map(np.testing.assert_array_equal, state.history.now, seen)
        jax.tree.map(np.testing.assert_array_equal, state.history.now, state.history.next)
        if number == 5:  # in the midst of an update, and back
            state = run(step, state, data=DATA[6].reshape(4, 4, 3)[:2])
            with checkpoints.open_folder(tmp_path) as saved:
                checkpoints.save(saved, state, data=None, config={})
                like = setup(optimizer=optax.MultiSteps(optax.adam(1e-2), 4))[0]
                restored = checkpoints.restore(saved, like).state
            assert (restored.history.next.losses != restored.history.now.losses).any()
            jax.tree.map(np.testing.assert_array_equal, restored, state)
            break
    whole = run_jit(DATA[:6]).history
    assert_same_history(state.history.now, whole)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateBefore:
    """The train state of checkpoints from before there was a history."""

    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict | None


def test_a_checkpoint_from_before_there_was_a_history_comes_back(tmp_path):
    optimizer = optax.adam(1e-2)
    for number, average in enumerate((True, False)):
        state = init_state(PARAMS, optimizer, ema=average)
        assert state.history is None
        old = StateBefore(jnp.int32(number), state.params, state.opt_state, state.ema)
        with checkpoints.open_folder(tmp_path) as saved:
            metadata = {"data": {"next_index": 5}, "config": {}}
            saved.orbax.save_checkpointables(number, {"state": old}, custom_metadata=metadata)
            restored = checkpoints.restore(saved, init_state(PARAMS, optimizer, ema=average))
        assert restored.state.history is None
        assert restored.data == {"next_index": 5}
        assert jax.tree.structure(restored.state) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored.state.params, PARAMS)
    with checkpoints.open_folder(tmp_path) as saved:
        with pytest.raises(checkpoints.CheckpointError, match="of another model or optimiser"):
            checkpoints.restore(
                saved, init_state(PARAMS, optimizer, ema=False, history=SAMPLER.init(10))
            )


def test_bad_arguments_are_refused():
    optimizer = optax.sgd(0.1)
    batch = {"x0": jnp.asarray(DATA[0])}
    history = SAMPLER.init(10)

    def step(loss_fn, history, update=SAMPLER.update):
        state = init_state(PARAMS, optimizer, ema=False, history=history)
        jax.eval_shape(make_train_step(loss_fn, optimizer, update_history=update), state, batch)

    with pytest.raises(ValueError, match=r"with update_history does .* state without a history"):
        step(loss_fn, None)
    with pytest.raises(ValueError, match=r"without update_history does .* state with a history"):
        step(loss_fn, history, None)

    def with_aux(aux):
        return lambda *args: (loss_fn(*args)[0], aux)

    for aux in ({}, {"t": jnp.zeros(BATCH, int)}, {"t": jnp.zeros(BATCH, int), "loss": 1.0}):
        with pytest.raises(ValueError, match=r"needs 't' and 'loss' of shape \(16,\) in the aux"):
            step(with_aux(aux), history)
