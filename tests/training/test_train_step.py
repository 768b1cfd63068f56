"""The train step: the same numbers however it is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff import denoisers, grids, losses, predictions, sample, schedules, solvers, timesteps
from jaxdiff.models import UNet
from jaxdiff.training import ema, init_state, make_train_step

SCHEDULE = schedules.linear(100, 1e-3, 0.1)
SHAPE = (4, 4, 1)
BATCH = 16
DATA = np.random.default_rng(0).normal(size=(10, BATCH, *SHAPE)).astype(np.float32)


def linear_network(params, x, noise_level, cond):
    """A small network without frills: quick to compile, sensitive to all of its arguments."""
    level = noise_level[:, None, None, None] / 100
    return params["w"] * x + params["b"][None] * level + params["c"] * x * level


PARAMS = {"w": jnp.float32(0.3), "b": jnp.ones(SHAPE), "c": jnp.float32(-0.2)}


@functools.cache
def unet():
    model = UNet(
        out_channels=1, channels=8, channel_multipliers=(1,), num_res_blocks=1,
        attention_levels=(), dropout=0.3,
    )  # fmt: skip
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))
    rng = np.random.default_rng(1)  # nothing at 0, so that every layer counts; compiles nothing
    return model.apply, jax.tree.map(
        lambda a: jnp.asarray(0.2 * rng.standard_normal(a.shape), a.dtype), shapes
    )


def setup(kind, axis_name=None):
    apply_fn, params = (linear_network, PARAMS) if kind == "linear" else unet()
    loss_fn = losses.denoising_loss(
        apply_fn, SCHEDULE, predictions.eps, losses.min_snr(),
        timesteps.stratified(BATCH), dropout=kind == "unet",
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    step = make_train_step(loss_fn, optimizer, ema.warmup(0.99), axis_name, key=jax.random.key(5))
    return init_state(jax.tree.map(jnp.copy, params), optimizer), step


def run(step, state, place=lambda x: x):
    losses_ = []
    for x0 in DATA:
        state, metrics = step(state, place({"x0": jnp.asarray(x0)}))
        losses_.append(jax.tree.map(lambda v: float(np.ravel(v)[0]), metrics))
    return state, losses_


def run_jit(kind):
    state, step = setup(kind)
    step = jax.jit(step, donate_argnums=0)
    result = run(step, state)
    assert step._cache_size() == 1  # nothing is compiled after the first step
    return result


def run_mesh(kind):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    state, step = setup(kind)
    step = jax.jit(step, donate_argnums=0)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    result = run(step, state, lambda batch: jax.device_put(batch, rows))
    assert step._cache_size() == 1
    return result


def run_shard_map(kind):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    state, step = setup(kind, "data")
    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=(PartitionSpec(), PartitionSpec()),
        ),
        donate_argnums=0,
    )  # fmt: skip
    rows = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    result = run(step, state, lambda batch: jax.device_put(batch, rows))
    assert step._cache_size() == 1
    return result


def run_pmap(kind):
    state, step = setup(kind, "data")
    step = jax.pmap(step, axis_name="data", donate_argnums=0)
    state = jax.tree.map(lambda a: jnp.stack([a] * 8), state)
    state, metrics = run(
        step, state, lambda batch: jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), batch)
    )
    return jax.tree.map(lambda a: a[0], state), metrics


@pytest.fixture(scope="module", params=["linear", "unet"])
def reference(request):
    return request.param, *run_jit(request.param)


@pytest.mark.parametrize("other", [run_mesh, run_shard_map, run_pmap])
def test_every_way_to_run_gives_the_same_numbers(reference, other):
    kind, state, metrics = reference
    got, got_metrics = other(kind)
    for a, b in zip(got_metrics, metrics, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
    assert int(got.step) == 10
    for tree in ("params", "ema"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),  # Adam magnifies rounding
            getattr(got, tree), getattr(state, tree),
        )  # fmt: skip


def test_the_same_run_twice_is_the_same_to_the_bit(reference):
    kind, state, metrics = reference
    again, again_metrics = run_jit(kind)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert again_metrics == metrics


def test_draws_depend_on_run_key_step_and_index():
    seen = []

    def loss_fn(params, key, batch):
        seen.append((np.asarray(jax.random.key_data(key)).tolist(), batch["index"].tolist()))
        return params * jnp.ones(batch["x0"].shape[0]), {}

    optimizer = optax.sgd(0.0)
    for seed in (0, 0, 1):
        state = init_state(jnp.float32(1), optimizer, ema=False)
        step = make_train_step(loss_fn, optimizer, key=jax.random.key(seed))
        with jax.disable_jit():
            for _ in range(2):
                state, _ = step(state, {"x0": jnp.zeros((3, 1))})
    assert seen[:2] == seen[2:4]
    assert len({tuple(key) for key, _ in seen}) == 4
    assert seen[0][1] == [0, 1, 2]


def test_accumulation_equals_the_large_batch():
    # Four microbatches of 4 against one batch of 16: the same draws, gradients and averages.
    loss_fn = losses.denoising_loss(
        linear_network, SCHEDULE, predictions.v, timesteps=timesteps.stratified(BATCH)
    )
    large = optax.adam(1e-2)
    small = optax.MultiSteps(optax.adam(1e-2), 4)
    key = jax.random.key(1)
    step = jax.jit(make_train_step(loss_fn, large, ema.warmup(0.9), key=key))
    micro = jax.jit(make_train_step(loss_fn, small, ema.warmup(0.9), key=key))
    state, accumulated = init_state(PARAMS, large), init_state(PARAMS, small)
    for x0 in DATA[:4]:
        state, metrics = step(state, {"x0": x0})
        losses_ = []
        for part in x0.reshape(4, 4, *SHAPE):
            before = accumulated.ema
            accumulated, values = micro(accumulated, {"x0": part})
            losses_.append(values["loss"])
            if len(losses_) < 4:
                jax.tree.map(np.testing.assert_array_equal, accumulated.ema, before)
        np.testing.assert_allclose(np.mean(losses_), metrics["loss"], rtol=1e-5)
        for tree in ("params", "ema"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
                getattr(accumulated, tree), getattr(state, tree),
            )  # fmt: skip


def test_a_given_index_is_kept():
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn, optimizer))
    state = init_state(PARAMS, optimizer, ema=False)
    x0 = jnp.asarray(DATA[0])
    plain = step(state, {"x0": x0})[1]["loss"]
    assert step(state, {"x0": x0, "index": jnp.arange(BATCH)})[1]["loss"] == plain
    assert step(state, {"x0": x0, "index": jnp.arange(BATCH) + 1})[1]["loss"] != plain


def test_ema_is_the_recursion_and_warms_up():
    decay = ema.warmup(0.999)
    average, params = np.float64(2.0), np.linspace(1, 3, 50)
    got = jnp.float32(2.0)
    for n, p in enumerate(params):
        d = min(0.999, (1 + n) / (10 + n))
        average = d * average + (1 - d) * p
        got = ema.update(got, jnp.float32(p), decay(n))
    np.testing.assert_allclose(got, average, rtol=1e-6)
    # A constant decay in the step.
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    optimizer = optax.sgd(0.1)
    state = init_state(PARAMS, optimizer)
    after, _ = make_train_step(loss_fn, optimizer, 0.75)(state, {"x0": jnp.asarray(DATA[0])})
    expected = 0.75 * PARAMS["w"] + 0.25 * after.params["w"]
    np.testing.assert_allclose(after.ema["w"], expected, rtol=1e-6)


def test_bad_arguments_are_refused():
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    optimizer = optax.sgd(0.1)
    with pytest.raises(TypeError, match="typed key"):
        make_train_step(loss_fn, optimizer, key=jax.random.PRNGKey(0))
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
            make_train_step(loss_fn, optimizer, decay)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        ema.warmup(1.5)
    batch = {"x0": jnp.asarray(DATA[0])}
    with pytest.raises(ValueError, match="does not fit a state with an average"):
        make_train_step(loss_fn, optimizer)(init_state(PARAMS, optimizer), batch)
    with pytest.raises(ValueError, match="does not fit a state without an average"):
        make_train_step(loss_fn, optimizer, 0.9)(init_state(PARAMS, optimizer, ema=False), batch)


def skipping(optimizer, **options):
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    step = make_train_step(loss_fn, optimizer, 0.9, skip_nonfinite=True, **options)
    return init_state(PARAMS, optimizer, skip_nonfinite=True), jax.jit(step)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped_and_counted(devices, bad):
    rows = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))
    state, step = skipping(optax.adam(3e-3))
    state, metrics = step(state, {"x0": jax.device_put(DATA[0], rows)})
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (0, 0)
    broken = DATA[1].copy()
    broken[BATCH - 1, 0, 0, 0] = bad  # of one device
    for count in (1, 2, 3):
        after, metrics = step(state, {"x0": jax.device_put(broken, rows)})
        assert not np.isfinite(metrics["loss"])
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (count, count)
        for part in ("params", "opt_state", "ema"):
            assert same(getattr(after, part), getattr(state, part))
        assert int(after.step) == int(state.step) + 1
        state = after
    after, metrics = step(state, {"x0": jax.device_put(DATA[1], rows)})
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (3, 0)
    # It goes on as if there had been nothing but the later step.
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    plain = jax.jit(make_train_step(loss_fn, optax.adam(3e-3), 0.9))
    want, _ = plain(dataclasses.replace(state, skipped=None), {"x0": jnp.asarray(DATA[1])})
    assert not same(after.params, state.params)
    for part in ("params", "opt_state", "ema"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, part)) for s in (after, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_in_the_place_of_a_skipped_microbatch_comes_the_next():
    ends = []
    for batches in ([0, 1, 2, 3], [0, None, 1, 2, None, None, 3]):
        state, step = skipping(optax.MultiSteps(optax.adam(3e-3), 2))
        for number in batches:
            x0 = np.full_like(DATA[0], np.nan) if number is None else DATA[number]
            state, _ = step(state, {"x0": jnp.asarray(x0)})
        ends.append(state)
    assert same(ends[0].params, ends[1].params)
    assert same(ends[0].ema, ends[1].ema)
    assert int(ends[1].skipped.total) == 3


def test_a_history_learns_nothing_of_what_is_skipped():
    sampler = timesteps.loss_aware()
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps, timesteps=sampler)
    optimizer = optax.sgd(0.1)
    step = make_train_step(
        loss_fn, optimizer, 0.9, update_history=sampler.update, skip_nonfinite=True
    )
    state = init_state(PARAMS, optimizer, history=sampler.init(SCHEDULE), skip_nonfinite=True)
    after, _ = jax.jit(step)(state, {"x0": jnp.full_like(DATA[0], jnp.nan)})
    assert same(after.history, state.history)
    after, _ = jax.jit(step)(state, {"x0": jnp.asarray(DATA[0])})
    assert not same(after.history, state.history)


def test_a_state_without_counts_is_refused():
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    optimizer, batch = optax.sgd(0.1), {"x0": jnp.asarray(DATA[0])}
    with pytest.raises(ValueError, match=r"skip_nonfinite=True.* a state without counts"):
        make_train_step(loss_fn, optimizer, 0.9, skip_nonfinite=True)(
            init_state(PARAMS, optimizer), batch
        )
    with pytest.raises(ValueError, match=r"skip_nonfinite=False.* a state with counts"):
        make_train_step(loss_fn, optimizer, 0.9)(
            init_state(PARAMS, optimizer, skip_nonfinite=True), batch
        )


def test_further_averages_follow_their_own_recursions():
    averages = {"fast": 0.5, "power": ema.power(0.1)}
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    ends = []
    for optimizer in (optax.sgd(0.1), optax.MultiSteps(optax.sgd(0.1), 2)):
        state = init_state(PARAMS, optimizer, averages=averages)
        step = jax.jit(make_train_step(loss_fn, optimizer, 0.9, averages=averages))
        expected = {name: np.float64(PARAMS["w"]) for name in ("fast", "power", "ema")}
        updates = 0
        for x0 in DATA:
            before = state
            state, metrics = step(state, {"x0": jnp.asarray(x0)})
            leaves = [np.float64(leaf).ravel() for leaf in jax.tree.leaves(state.params)]
            norm = np.linalg.norm(np.concatenate(leaves))
            np.testing.assert_allclose(metrics["param_norm"], norm, rtol=1e-6)
            if int(state.step) % (1 + len(ends)):
                assert same(state.averages, before.averages)  # no update yet
                continue
            updates += 1
            decays = {"fast": 0.5, "power": (1 - 1 / updates) ** (6.9372 + 1), "ema": 0.9}
            for name, d in decays.items():
                expected[name] = d * expected[name] + (1 - d) * np.float64(state.params["w"])
        got = {name: tree["w"] for name, tree in state.averages.items()} | {"ema": state.ema["w"]}
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5)
        ends.append(updates)
    assert ends == [10, 5]


def test_averages_that_do_not_fit_are_refused():
    loss_fn = losses.denoising_loss(linear_network, SCHEDULE, predictions.eps)
    optimizer, batch = optax.sgd(0.1), {"x0": jnp.asarray(DATA[0])}
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        make_train_step(loss_fn, optimizer, averages={"a": 1.0})
    assert init_state(PARAMS, optimizer).averages is None
    for names, decays in ((["a"], None), ([], {"a": 0.5}), (["a"], {"b": 0.5})):
        state = init_state(PARAMS, optimizer, averages=names, ema=False)
        step = make_train_step(loss_fn, optimizer, averages=decays)
        with pytest.raises(ValueError, match=r"averages=.* do not fit a state with"):
            step(state, batch)


def features(x, noise_level):
    level = jnp.broadcast_to(noise_level.astype(x.dtype)[:, None] / 100, (x.shape[0], 1))
    return jnp.concatenate([x.reshape(x.shape[0], -1), level], axis=1)


def nnx_network():
    model = nnx.Sequential(
        nnx.Linear(17, 32, rngs=nnx.Rngs(0)), nnx.silu, nnx.Linear(32, 16, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model)

    def apply_fn(params, x, noise_level, cond):
        return nnx.merge(graph, params)(features(x, noise_level)).reshape(x.shape)

    return apply_fn, params


def equinox_network():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(17, 16, 32, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(params, x, noise_level, cond):
        out = jax.vmap(eqx.combine(params, static))(features(x, noise_level))
        return out.reshape(x.shape)

    return apply_fn, params


def haiku_network():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(
        hk.transform(lambda x, t: hk.nets.MLP([32, 16])(features(x, t)).reshape(x.shape))
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))
    return lambda params, x, noise_level, cond: model.apply(params, x, noise_level), params


@pytest.mark.parametrize("network", [nnx_network, equinox_network, haiku_network])
def test_networks_of_other_frameworks_train_and_sample(network):
    apply_fn, params = network()
    data = denoisers.gaussian(np.full(SHAPE, 0.8), 0.1).sample(jax.random.key(0), BATCH)
    loss_fn = losses.denoising_loss(apply_fn, SCHEDULE, predictions.x0)
    optimizer = optax.adam(1e-2)
    state = init_state(params, optimizer)
    step = jax.jit(make_train_step(loss_fn, optimizer, ema.warmup(0.9)))
    history = []
    for _ in range(200):
        state, metrics = step(state, {"x0": data})
        history.append(float(metrics["loss"]))
    assert np.mean(history[-20:]) < 0.2 * np.mean(history[:5])
    denoiser = denoisers.from_network(apply_fn, state.ema, SCHEDULE, predictions.x0)
    x = jax.jit(
        lambda key: sample(key, denoiser, solvers.ddim(), grids.trailing(SCHEDULE, 10), (8, *SHAPE))
    )(jax.random.key(1))
    assert abs(float(x.mean()) - 0.8) < 0.15
