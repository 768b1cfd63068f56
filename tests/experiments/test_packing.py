"""A packed train state trains as the state it is made of, on one device and on several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ml_collections")

from experiments import build, packing, runtime
from jaxdiff.training import sharding
from tests import small_runs

SHAPE = (4, 4, 1)
OWN = {"train": {"batch_size": 16, "num_steps": 8}}
PLAIN = {}
MUCH = {
    "optimizer": {"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.01},
    "averages": {"half_lives": (100,), "sigma_rels": (0.1,)},
    "timesteps": "loss_aware",
    "train": {"microbatches": 2},
}


@pytest.fixture(autouse=True)
def pointwise(monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)


def batches(count):
    generator = np.random.default_rng(0)
    return [{"x0": generator.uniform(-1, 1, (16, *SHAPE)).astype(np.float32)} for _ in range(count)]


def run(changes, devices, *, packed=False, mapped=False, steps=3):
    """Returns the state after some steps, whole, and the metrics of the last."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    config = small_runs.tiny(OWN, changes)
    init, step = build.make_training(config, SHAPE, None, mesh, mapped=mapped)
    like = jax.eval_shape(init)
    advance = jax.jit(step, out_shardings=sharding.everywhere(mesh))
    state = jax.jit(init, out_shardings=sharding.everywhere(mesh))()
    if packed:
        state = packing.pack(state, like.params)
    for batch in batches(steps):
        state, metrics = advance(state, sharding.from_rows(batch, sharding.rows(mesh)))
    if packed:
        state = packing.unpack(state, like, like.params)
    return state, metrics


@pytest.mark.parametrize("changes", [PLAIN, MUCH])
def test_what_is_packed_comes_out_again(changes):
    state, _ = run(changes, 1)
    packed = packing.pack(state, state.params)
    again = packing.unpack(packed, jax.eval_shape(lambda: state), state.params)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    # Parameters, both moments, and the averages: a vector each.
    averages = [packed.ema, *(packed.averages or {}).values()]
    vectors = [leaf for leaf in jax.tree.leaves(packed) if leaf.shape == (size,)]
    assert len(vectors) == 3 + len(averages)
    assert packed.params.shape == packed.ema.shape == (size,)
    # In the order of the leaves, with nothing left of the old ones.
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])
    np.testing.assert_array_equal(packed.params, expected)
    kept = {leaf.shape for leaf in jax.tree.leaves(dataclasses.replace(packed, history=None))}
    assert kept == {(), (size,)}


@pytest.mark.parametrize("changes", [PLAIN, MUCH])
@pytest.mark.parametrize(("devices", "packed"), [(1, True), (8, False), (8, True)])
def test_steps_are_those_of_one_device_and_small_arrays(changes, devices, packed):
    expected, metrics = run(changes, 1)
    state, found = run(changes, devices, packed=packed, mapped=devices > 1)
    assert found.keys() == metrics.keys()
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(compare, found, metrics)
    jax.tree.map(compare, state, expected)
    start = build.make_training(small_runs.tiny(OWN, changes), SHAPE)[0]()
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, start.params)
    assert min(jax.tree.leaves(moved)) > 1e-5  # far more than the tolerance


def test_what_is_packed_and_mapped_is_chosen_by_the_machine(monkeypatch):
    one, eight = (sharding.make_mesh(devices=jax.devices()[:n]) for n in (1, 8))
    divided = sharding.make_mesh(1, 8)
    small = {
        "a": jax.ShapeDtypeStruct((4, 4), jnp.float32),
        "b": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    large = small | {"a": jax.ShapeDtypeStruct((2**11, 2**12), jnp.float32)}
    mixed = small | {"a": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)}
    assert [runtime.packs(mesh, small) for mesh in (one, eight, divided)] == [True, True, False]
    assert not runtime.packs(one, large)
    assert not runtime.packs(one, mixed)
    assert not runtime.packs(one, {"a": small["a"]})  # which is one array as it is
    assert [runtime.maps_devices(mesh) for mesh in (one, eight, divided)] == [False, True, False]
    huge = small | {"a": jax.ShapeDtypeStruct((2**14, 2**14), jnp.float32)}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [runtime.packs(one, params) for params in (small, large, huge)] == [True, True, False]
    assert not runtime.packs(divided, small)
    assert not runtime.maps_devices(eight)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not runtime.packs(one, small)
