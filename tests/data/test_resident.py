"""Data on the device: the pipeline's batches, bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")

from jaxdiff.data import from_arrays, from_sequences, make_pipeline, resident

RNG = np.random.default_rng(0)
MASK = np.arange(6)[None] < RNG.integers(1, 7, (13, 1))
SEQUENCES = from_sequences(RNG.uniform(-1, 1, (13, 6, 2)), MASK, RNG.normal(size=(13, 3)))


def images(*shape, labels=True):
    pixels = RNG.integers(0, 256, (13, *shape), np.uint8)
    return from_arrays(pixels, np.arange(13) if labels else None)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def pull(iterator, count):
    pulled = [next(iterator) for _ in range(count)]
    iterator.close()
    return pulled


def test_every_pixel_value_has_the_bits_of_the_pipeline():
    source = from_arrays(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1))
    options = {"batch_size": 2, "seed": 0}
    arrays, addresses, take = resident(source, **options)
    (expected,), (address,) = pull(make_pipeline(source, **options), 1), pull(addresses, 1)
    assert_same_bits(jax.jit(take)(arrays, address), expected)
    assert_same_bits(take(arrays, address), expected)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (images(5, 4, 3), {}),
        (images(5, 4, 3), {"shuffle": False, "flip": True}),
        (images(4, 5, 3, labels=False), {"flip": True, "dequantize": True}),
        (images(5, 4, 1), {"flip": True, "pad_to": 7}),
        (images(5, 4, 1), {"flip": True, "pad_to": 9, "shrink": 3}),
        (images(5, 4, 1), {"dequantize": True, "pad_to": 8, "shrink": 2, "flip": True}),
        (images(12, 12, 2), {"shrink": 6}),
        (images(2, 4, 6, 1), {"flip": True, "shrink": 2}),
        (images(5, 4, 3), {"flip": True, "process_index": 1, "process_count": 2}),
        (SEQUENCES, {}),
        (SEQUENCES, {"crop": 0.6}),
        (SEQUENCES, {"crop": 1.0, "process_index": 0, "process_count": 3}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_batches_are_those_of_the_pipeline(source, options):
    options = {"batch_size": 6, "seed": 3, "num_epochs": 3, **options}
    arrays, addresses, take = resident(source, **options)
    take = jax.jit(take)
    batches = list(make_pipeline(source, **options))
    got = [take(arrays, address) for address in addresses]
    assert len(batches) == 6  # over the ends of two epochs; 3 of 39 are left out
    for one, other in zip(got, batches, strict=True):
        assert_same_bits(one, other)
    assert take._cache_size() == 1


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (images(4, 4, 3), {"flip": True, "pad_to": 6, "shrink": 2, "dequantize": True}),
        (SEQUENCES, {"crop": 0.6}),
    ],
)
def test_rows_may_be_sharded_and_steps_scanned(source, options):
    options = {"batch_size": 16, "seed": 5, **options}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    arrays, addresses, take = resident(source, **options)
    arrays = jax.device_put(arrays, everywhere)
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *pull(addresses, 3))
    stacked = jax.device_put(stacked, jax.NamedSharding(mesh, jax.P(None, "data")))

    @jax.jit
    def run(arrays, addresses):
        return jax.lax.scan(lambda carry, address: (carry, take(arrays, address)), 0, addresses)[1]

    got = run(arrays, stacked)
    assert not got["x0"].sharding.is_fully_replicated
    for step, batch in enumerate(pull(make_pipeline(source, **options), 3)):
        assert_same_bits(jax.tree.map(lambda rows, step=step: rows[step], got), batch)


def test_a_run_goes_over_from_one_to_the_other_at_any_step():
    source, options = images(4, 4, 1), {"batch_size": 6, "seed": 3, "flip": True}
    reference = pull(make_pipeline(source, **options), 7)
    batches = make_pipeline(source, **options)
    arrays, addresses, take = resident(source, **options)
    take = jax.jit(take)
    for step in range(0, 6, 2):
        assert_same_bits(next(batches), reference[step])
        addresses.set_state(json.loads(json.dumps(batches.get_state())))
        assert_same_bits(take(arrays, next(addresses)), reference[step + 1])
        batches.set_state(addresses.get_state())
        assert batches.get_state() == {"next_index": step + 2}
    assert_same_bits(next(batches), reference[6])
    batches.close()
    addresses.close()


def test_only_decisions_travel():
    source = images(8, 8, 3)
    arrays, addresses, _ = resident(source, batch_size=6, seed=0, flip=True, pad_to=16, shrink=4)
    (address,) = pull(addresses, 1)
    assert sum(array.nbytes for array in address.values()) == 6 * (4 + 1)
    np.testing.assert_array_equal(arrays["image"], source.images)
    np.testing.assert_array_equal(arrays["label"], source.labels)
    lazy = [source[i] for i in range(13)]
    assert_same_bits(resident(lazy, batch_size=6, seed=0)[0], arrays)


def test_taking_leaves_the_address_alone():
    arrays, addresses, take = resident(images(4, 4, 1), batch_size=6, seed=0, dequantize=True)
    (address,) = pull(addresses, 1)
    before = {key: value.copy() for key, value in address.items()}
    take(jax.tree.map(jnp.asarray, arrays), address)
    assert_same_bits(address, before)


def test_mistakes_are_refused_as_by_the_pipeline():
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shrink": 3}, "shrink must divide"),
        ({"crop": 0.5}, "crop is for sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            resident(images(4, 4, 1), **{"batch_size": 6, "seed": 0, **options})
    mixed = [{"image": np.zeros((2, width, 1), np.uint8)} for width in (3, 4)]
    with pytest.raises(ValueError, match="must have one shape"):
        resident(mixed, batch_size=2, seed=0)
    with pytest.raises(TypeError, match="zoom"):
        resident(images(4, 4, 1), batch_size=6, seed=0, zoom=2)
