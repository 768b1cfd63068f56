"""Validation on a fixed grid: the same numbers always, and the right ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff import denoisers, losses, predictions, rng, schedules, validation
from jaxdiff.base import Prediction

SCHEDULE = schedules.linear(1000)
POINTS = validation.grid(SCHEDULE, 5)
EXACT = denoisers.gaussian(np.zeros((4, 4, 1)), 0.4)


def run(denoiser=EXACT.denoiser, points=POINTS, key=0):
    return jax.jit(
        lambda x0, **arrays: validation.errors(jax.random.key(key), denoiser, x0, points, **arrays)
    )


def test_the_grid_is_in_the_middle_of_equal_shares():
    np.testing.assert_array_equal(POINTS.t, [100, 300, 500, 700, 900])
    np.testing.assert_array_equal(validation.grid(SCHEDULE, 1000).t, np.arange(1000))
    np.testing.assert_allclose(
        validation.grid(schedules.vp_linear(), 4).t, [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    )


def test_numbers_do_not_depend_on_batches_or_devices():
    # Bit for bit, where the denoiser itself does not depend on them.
    x0 = EXACT.sample(jax.random.key(1), 24)
    errors = run()
    whole = np.asarray(errors(x0, index=jnp.arange(24)))
    for size in (1, 8):
        parts = [
            errors(x0[i : i + size], index=jnp.arange(i, i + size)) for i in range(0, 24, size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    rows = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    spread = jax.device_put((x0, jnp.arange(24)), rows)
    np.testing.assert_array_equal(errors(spread[0], index=spread[1]), whole)
    np.testing.assert_array_equal(errors(x0, index=jnp.arange(24)), whole)
    assert np.all(errors(x0, index=24 + jnp.arange(24)) != whole)
    assert np.all(run(key=1)(x0) != whole)


def test_errors_are_those_of_the_noise_at_its_address():
    # A denoiser that says x: the error is that of alpha x0 + sigma eps - x0, in float64.
    x0 = EXACT.sample(jax.random.key(1), 3)
    index = jnp.array([5, 0, 7])
    got = run(lambda x, node: Prediction(x))(x0, index=index)
    keys = rng.per_example(jax.random.key(0), index)
    for j in range(5):
        eps = rng.normal(rng.stream(keys, rng.Stream.FORWARD, j), (4, 4, 1))
        node = jax.tree.map(np.float64, POINTS[j])
        clean, noise = np.asarray(x0, float), np.asarray(eps, float)
        off = (node.alpha - 1) * clean + node.sigma * noise
        np.testing.assert_allclose(got[j], (off**2).mean((1, 2, 3)), rtol=1e-5)


def test_gaussian_data_have_the_losses_of_their_closed_form():
    # 2000 examples; 20 z-scores, false alarm of each 4e-8.
    x0 = EXACT.sample(jax.random.key(1), 2000)
    errors = run()(x0)
    alpha, sigma = np.asarray(POINTS.alpha, float), np.asarray(POINTS.sigma, float)
    expected = 0.16 * sigma**2 / (0.16 * alpha**2 + sigma**2)
    found = validation.summarize(errors, POINTS, predictions.v, losses.snr)
    np.testing.assert_allclose(found.log_snr, 2 * np.log(alpha / sigma))
    snr = (alpha / sigma) ** 2
    for estimate, scale in ((found.x0, 1), (found.eps, snr), (found.v, 1 + snr)):
        assert estimate.mean.dtype == np.float64
        assert np.all(np.abs(estimate.mean - scale * expected) < 5.5 * estimate.error)
        spread = scale * np.std(np.asarray(errors, float), axis=1, ddof=1) / np.sqrt(2000)
        np.testing.assert_allclose(estimate.error, spread, rtol=1e-4)
    # The weighting of eps, stated on v, is the plain loss of eps.
    weighted = np.mean(snr[:, None] * np.asarray(errors, float), axis=0)
    np.testing.assert_allclose(found.weighted.mean, weighted.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        found.weighted.error, weighted.std(ddof=1) / np.sqrt(2000), rtol=1e-6
    )
    plain = validation.summarize(errors, POINTS, predictions.eps)
    np.testing.assert_allclose(plain.weighted.mean, plain.eps.mean.mean(), rtol=1e-6)


def test_it_is_the_loss_of_training():
    # At the same noise level the loss of training has the same expectation: 4000 examples, one
    # z-score, false alarm 4e-8.
    def network(params, x, noise_level, cond):
        return 0.8 * x

    x0 = EXACT.sample(jax.random.key(1), 4000)
    points = validation.grid(SCHEDULE, 40)
    denoiser = denoisers.from_network(network, None, SCHEDULE, predictions.v)
    errors = run(denoiser, points)(x0)
    found = validation.summarize(errors, points, predictions.v, losses.min_snr())
    loss_fn = losses.denoising_loss(network, SCHEDULE, predictions.v, losses.min_snr())
    loss, _ = jax.jit(loss_fn)(None, jax.random.key(5), {"x0": x0})
    error = np.hypot(found.weighted.error, np.std(loss) / np.sqrt(4000))
    # The middles of 40 shares stand for 1000 indices.
    assert abs(found.weighted.mean - np.mean(np.asarray(loss, float))) < 5.5 * error + 1e-4
    assert error < 0.005


def test_what_is_masked_does_not_count():
    x0 = EXACT.sample(jax.random.key(1), 3)
    mask = np.zeros((3, 4, 4, 1))
    mask[0], mask[1, :2] = 1, 1
    off = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1)

    def denoiser(x, node):
        return Prediction(jnp.where(mask > 0, x0 + off, jnp.nan))

    got = run(denoiser)(jnp.where(mask > 0, x0, jnp.nan), mask=mask)
    squares = np.broadcast_to(off, mask.shape) ** 2
    expected = (squares * mask).sum((1, 2, 3)) / np.maximum(mask.sum((1, 2, 3)), 1)
    np.testing.assert_allclose(got, np.broadcast_to(expected, (5, 3)), rtol=1e-5)


def test_one_example_tells_no_error():
    found = validation.summarize(np.ones((5, 1)), POINTS, predictions.eps)
    assert np.isnan(found.weighted.error)
    assert np.isnan(found.v.error).all()
    np.testing.assert_array_equal(found.x0.mean, 1)


def test_bad_arguments_are_refused():
    x0 = jnp.zeros((2, 4, 4, 1))
    for num in (0, 1001):
        with pytest.raises(ValueError, match="num_points must be at least 1 and at most 1000"):
            validation.grid(SCHEDULE, num)
    with pytest.raises(ValueError, match="num_points must be at least 1, got 0"):
        validation.grid(schedules.vp_linear(), 0)
    with pytest.raises(ValueError, match=r"points must be a Node with fields \(N,\)"):
        run(points=SCHEDULE.at(3))(x0)
    with pytest.raises(ValueError, match="mask must broadcast"):
        run()(x0, mask=jnp.ones((3, 3)))
    with pytest.raises(TypeError, match="must be floating"):
        run()(x0.astype(jnp.uint8))
    for errors in (np.ones((4, 3)), np.ones(5), np.ones((5, 0))):
        with pytest.raises(ValueError, match=r"errors must be \(5, examples\)"):
            validation.summarize(errors, POINTS, predictions.eps)
