"""Each array is where the rule says, and training does not depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxdiff.training import init_state, make_train_step, sharding


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [(-1, 1, (8, 1)), (1, -1, (1, 8)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (4, 2, (4, 2))],
)
def test_a_mesh_has_all_devices_in_order(data, fsdp, shape):
    mesh = sharding.make_mesh(data, fsdp)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp")
    assert list(mesh.devices.flat) == sorted(jax.devices(), key=lambda d: d.id)


@pytest.mark.parametrize(("data", "fsdp"), [(-1, -1), (3, -1), (2, 2), (0, -1), (-1, 16), (-2, 4)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=f"number of devices, 8, got data={data}, fsdp={fsdp}"):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), P(None, None, None, "fsdp")),
        ((3, 3, 128, 64), P(None, None, "fsdp")),
        ((64, 64), P(None, "fsdp")),
        ((101, 64), P(None, "fsdp")),  # the larger axis cannot be divided
        ((4096,), P("fsdp")),
        ((8, 8), P()),  # small
        ((3, 3, 35, 35), P()),
        ((), P()),
    ],
)
def test_the_largest_divisible_axis_is_divided(shape, spec):
    mesh = sharding.make_mesh(-1, 4)
    assert sharding.fully_sharded(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)).spec == spec
    alone = sharding.make_mesh(-1, 1)
    assert sharding.fully_sharded(alone, jax.ShapeDtypeStruct(shape, jnp.float32)).spec == P()


def loss_fn(params, key, batch):
    hidden = jnp.tanh(batch["x0"] @ params["in"] + params["bias"][None])
    return jnp.sum(jnp.square(hidden @ params["out"] - batch["x0"]), axis=-1), {}


def run(data, fsdp, steps=5):
    """Returns the parameters, losses and compiled step of a small regression."""
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    rng = np.random.default_rng(0)
    x0 = rng.normal(size=(steps, 16, 32)).astype(np.float32)
    params = {
        "in": rng.normal(size=(32, 64)).astype(np.float32) / 8,
        "bias": np.zeros(64, np.float32),
        "out": rng.normal(size=(64, 32)).astype(np.float32) / 8,
    }

    def gathering(params, key, batch):
        return loss_fn(sharding.gathered(mesh, params), key, batch)

    state = init_state(jax.tree.map(jnp.asarray, params), optimizer)
    places = sharding.fully_sharded(mesh, state)
    step = jax.jit(
        make_train_step(gathering, optimizer, 0.9),
        out_shardings=(places, sharding.everywhere(mesh)),
    )
    state, losses = jax.device_put(state, places), []
    for rows in x0:
        batch = sharding.from_rows({"x0": rows}, sharding.rows(mesh))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses, step.lower(state, batch).compile()


def test_all_meshes_train_alike_and_fsdp_divides_the_state():
    state, losses, compiled = run(1, 1)
    whole = compiled.memory_analysis().argument_size_in_bytes
    for data, fsdp in ((8, 1), (1, 8), (2, 4)):
        other, others, compiled = run(data, fsdp)
        np.testing.assert_allclose(others, losses, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        kernel = other.opt_state[1][0].mu["in"]
        assert kernel.addressable_shards[0].data.size == 32 * 64 // fsdp
        assert compiled.memory_analysis().argument_size_in_bytes < 1.3 * whole / fsdp
        assert ("all-gather" in compiled.as_text()) == (fsdp > 1)


def test_placed_keeps_shapes_and_takes_shardings():
    mesh = sharding.make_mesh(-1, 8)
    tree = {"a": jnp.zeros((64, 64), jnp.bfloat16), "b": jnp.int32(3)}
    one = sharding.placed(tree, sharding.everywhere(mesh))
    each = sharding.placed(tree, sharding.fully_sharded(mesh, tree))
    assert one["a"].dtype == jnp.bfloat16
    assert one["a"].sharding.spec == P()
    assert each["a"].sharding.spec == P(None, "fsdp")
    assert each["b"].sharding.spec == P()


def test_rows_come_back_in_order():
    mesh = sharding.make_mesh(2, 4)
    x = np.arange(48, dtype=np.float32).reshape(16, 3)
    divided = sharding.from_rows(x, sharding.rows(mesh))
    assert divided.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(sharding.to_host(divided), x)
    for place in (sharding.rows(mesh), sharding.everywhere(mesh)):
        own, numbers = sharding.own_rows(jax.device_put(x, place))
        np.testing.assert_array_equal(own, x)
        np.testing.assert_array_equal(numbers, np.arange(16))
    stacked = sharding.from_rows(x[None], sharding.rows(mesh, axis=1))
    assert stacked.addressable_shards[0].data.shape == (1, 2, 3)
