"""What travels in batches comes back the same, to the bit, from any batch and any device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.evaluation.batches import map_batches

KERNEL = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(37, 4, 4, 3)).astype(np.float32)


def layer(kernel, x):
    flat = x.reshape(len(x), -1)
    return {"out": jnp.tanh(flat @ kernel), "mean": flat.mean(1)}


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 10, 37, 1000])
def test_batches_and_devices_change_no_bit(batch_size, devices):
    whole = map_batches(layer, KERNEL, IMAGES, unit=4, devices=jax.devices()[:1])
    np.testing.assert_allclose(whole["out"], np.tanh(IMAGES.reshape(37, -1) @ KERNEL), atol=1e-5)
    np.testing.assert_allclose(whole["mean"], IMAGES.mean((1, 2, 3)), atol=1e-6)
    found = map_batches(
        layer, KERNEL, IMAGES, unit=4, batch_size=batch_size, devices=jax.devices()[:devices]
    )
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name])


def test_one_program_serves_all_batches():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return x.sum((1, 2, 3))

    for _ in range(2):
        map_batches(counted, None, IMAGES, unit=4, batch_size=8, devices=jax.devices()[:1])
    assert set(traces) == {(4, 4, 4, 3)}
    assert len(traces) == 1


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 image, batch_size and unit, got 0, 256"):
        map_batches(layer, KERNEL, IMAGES[:0])
    with pytest.raises(ValueError, match="got 37, 0 and 32"):
        map_batches(layer, KERNEL, IMAGES, batch_size=0)
