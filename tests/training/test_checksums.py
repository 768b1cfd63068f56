"""Checksums find any change, and depend on nothing but what is stored."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.training import checksums

ARRAYS = {
    "float32": np.array([[1.5, -0.0, np.nan], [np.inf, 1e-45, 7.0]], np.float32),
    "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.arange(6).astype(ml_dtypes.float8_e4m3fn),
    "int32": np.arange(-3, 3, dtype=np.int32).reshape(3, 2),
    "int8": np.arange(-3, 3, dtype=np.int8),
    "uint16": np.arange(6, dtype=np.uint16),
    "bool": np.array([True, False, False]),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
}


def mixed(word):
    """Murmur3's finaliser, in Python's integers."""
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def by_hand(array):
    array = np.asarray(array)
    words = np.frombuffer(array.tobytes(), f"<u{array.dtype.itemsize}").tolist()
    total = sum(mixed(word ^ mixed(i + 1)) for i, word in enumerate(words)) % 2**32
    return f"{array.dtype} {total:08x}"


def test_they_are_what_the_definition_says():
    tree = {"a": ARRAYS, "b": [jnp.ones(3), {"c": jnp.zeros(2)}]}
    expected = {f"a/{name}": by_hand(array) for name, array in ARRAYS.items()}
    expected |= {"b/0": by_hand(np.ones(3, np.float32)), "b/1/c": by_hand(np.zeros(2, np.float32))}
    assert checksums.of_tree(jax.tree.map(jnp.asarray, tree)) == expected
    assert checksums.of_tree({}) == {}


@pytest.mark.parametrize("dtype", [np.float64, np.complex64])
def test_larger_elements_have_two_words_each(dtype):
    array = np.arange(1, 5).astype(dtype) * (1j if dtype == np.complex64 else 1 / 3)
    with jax.enable_x64(True):
        found = checksums.of_tree([jnp.asarray(array)])["0"]
    assert found.split() == [array.dtype.name, by_hand(array.view(np.uint32)).split()[1]]


def test_they_do_not_depend_on_the_sharding():
    rng = np.random.default_rng(0)
    host = {"a": rng.normal(size=(8, 6)).astype(np.float32), "b": np.arange(16) % 3 == 0}
    expected = {name: by_hand(array) for name, array in host.items()}
    devices = np.array(jax.devices()).reshape(4, 2)
    for spec in (PartitionSpec(), PartitionSpec("x"), PartitionSpec(("x", "y"))):
        sharding = NamedSharding(Mesh(devices, ("x", "y")), spec)
        assert checksums.of_tree(jax.device_put(host, sharding)) == expected


def test_every_flipped_bit_and_every_exchange_is_found():
    host = np.arange(1, 5, dtype=np.float32)
    changed = np.repeat(host.view(np.uint32)[None], 4 * 32 + 3, axis=0)
    for i in range(4 * 32):
        changed[i, i // 32] ^= np.uint32(1) << np.uint32(i % 32)
    for i in range(3):  # neighbours change places
        changed[4 * 32 + i, [i, i + 1]] = changed[4 * 32 + i, [i + 1, i]]
    rows = list(changed.view(np.float32))
    found = checksums.of_tree([*rows, host]).values()
    assert len(set(found)) == len(rows) + 1


def test_the_program_is_compiled_once():
    tree = {"a": jnp.ones(5), "b": jnp.zeros((2, 5))}
    other = {"a": jnp.zeros(5), "b": jnp.ones((2, 5))}
    checksums.of_tree(tree)
    before = checksums._program(None)._cache_size()
    checksums.of_tree(other)
    assert checksums._program(None)._cache_size() == before
