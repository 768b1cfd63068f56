"""Randomness is an address: what is drawn depends on it alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import rng


def test_streams_are_distinct_and_never_change():
    # A change here changes every result of every user: it is a break of the promise.
    assert {stream.name: stream.value for stream in rng.Stream} == {
        "TIME": 1, "NOISE": 2, "DROPOUT": 3, "LABEL_DROP": 4,
        "START": 5, "STEP": 6, "FORWARD": 7, "DATA": 8, "PATH": 9,
        "KNOWN": 10, "CORRECTOR": 11, "OFFSET": 12, "SELF_CONDITION": 13, "UP": 14,
        "LENGTH": 15, "PROBE": 16, "DEQUANTIZE": 17,
    }  # fmt: skip


def test_a_draw_depends_on_seed_and_index_alone():
    key = jax.random.key(3)
    whole = rng.normal(rng.per_example(key, jnp.arange(10)), (4, 4, 1))
    for size in (1, 3, 7):
        for first in range(0, 10 - size + 1, size):
            part = rng.normal(rng.per_example(key, first + jnp.arange(size)), (4, 4, 1))
            np.testing.assert_array_equal(part, whole[first : first + size])


def test_addresses_do_not_collide():
    keys = rng.per_example(jax.random.key(0), jnp.arange(20))
    drawn = [np.asarray(jax.random.key_data(rng.stream(keys, name))) for name in rng.Stream]
    drawn += [
        np.asarray(jax.random.key_data(rng.stream(keys, name, step)))
        for name in (rng.Stream.STEP, rng.Stream.FORWARD)
        for step in range(50)
    ]
    rows = np.concatenate(drawn)
    assert len(np.unique(rows, axis=0)) == len(rows) == 20 * (len(rng.Stream) + 100)


def test_examples_and_streams_are_independent():
    # 200,000 numbers; correlations have standard error 1/sqrt(n). False alarms: 5 at 1e-6 each.
    n = 200_000
    keys = rng.per_example(jax.random.key(1), jnp.arange(n))
    a = np.asarray(rng.normal(rng.stream(keys, rng.Stream.NOISE), ()))
    b = np.asarray(rng.normal(rng.stream(keys, rng.Stream.START), ()))
    bound = stats.norm.isf(0.5e-6) / np.sqrt(n)
    assert abs(np.corrcoef(a, b)[0, 1]) < bound
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < bound
    assert abs(a.mean()) < bound
    assert abs(a.var() - 1) < np.sqrt(2) * bound
    assert stats.kstest(a, "norm").pvalue > 1e-6


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), 0, np.zeros(2, np.uint32)])
def test_raw_keys_are_refused(key):
    with pytest.raises(TypeError, match=r"typed key.*jax\.random\.key"):
        rng.per_example(key, jnp.arange(2))


def test_an_array_of_keys_is_refused():
    with pytest.raises(TypeError, match="single key"):
        rng.per_example(jax.random.split(jax.random.key(0)), jnp.arange(2))
