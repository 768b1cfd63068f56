"""The parts that every network is made of, against their plain forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from jaxdiff.models.layers import dense, silu


def reference(x: np.ndarray) -> np.ndarray:
    """Returns x sigmoid(x) in float64."""
    x = np.asarray(x, np.float64)
    return np.where(x > 0, x / (1 + np.exp(-np.abs(x))), x * np.exp(x) / (1 + np.exp(x)))


def test_silu_is_x_times_its_sigmoid() -> None:
    x = np.linspace(-60, 60, 2001, dtype=np.float32)
    np.testing.assert_allclose(silu(x), reference(x), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("x", [-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])
def test_silu_and_its_derivative_stay_finite_far_out(x: float) -> None:
    y, slope = jax.value_and_grad(silu)(jnp.float32(x))
    np.testing.assert_allclose(y, max(x, 0.0), atol=1e-30)
    np.testing.assert_allclose(slope, 0.5 if x == 0 else float(x > 0), atol=1e-6)


def test_silu_can_be_differentiated_twice_in_both_modes() -> None:
    x = jnp.linspace(-4.0, 4.0, 17)
    check_grads(silu, (x,), order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)
    slopes = jax.vmap(jax.grad(silu))(x)
    np.testing.assert_allclose(slopes, jax.vmap(jax.grad(jax.nn.silu))(x), rtol=1e-5, atol=1e-6)


def test_silu_of_half_precision_is_rounded_once_and_its_derivative_is_near() -> None:
    x = jnp.linspace(-8.0, 8.0, 501).astype(jnp.bfloat16)
    y = silu(x)
    assert y.dtype == jnp.bfloat16
    exact = reference(np.asarray(x, np.float32)).astype(np.float32)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    wide = np.asarray(x, np.float64)
    share = 1 / (1 + np.exp(-wide))
    slopes = jax.vmap(jax.grad(silu))(x)
    assert slopes.dtype == jnp.bfloat16
    # Of some operations with 8 digits, in the middle of which stands x (1 - share).
    exact = share * (1 + wide * (1 - share))
    np.testing.assert_allclose(np.asarray(slopes, np.float64), exact, atol=6 * 2**-8)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)])
def test_dense_is_flax_dense(shape: tuple[int, ...]) -> None:
    x = jax.random.normal(jax.random.key(0), shape)
    ours, plain = dense(7), nn.Dense(7, kernel_init=nn.initializers.normal(1.0))
    params = plain.init(jax.random.key(1), x)

    def of(module: nn.Module) -> tuple[jax.Array, jax.Array]:
        def loss(params: object, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(module.apply(params, x)))

        return module.apply(params, x), jax.grad(loss, (0, 1))(params, x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), of(ours), of(plain))
