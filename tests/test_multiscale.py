"""The multi-scale loss against its definition in float64, block by block."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import denoisers, losses, predictions, schedules
from jaxdiff.process import sample_xt

SCHEDULE = schedules.linear()
RNG = np.random.default_rng(0)


def by_blocks(error, scales, mask=None):
    """Eq. (2) and (3), a loop over blocks."""
    error = np.asarray(error, np.float64)
    mask = np.ones(error.shape) if mask is None else np.broadcast_to(mask, error.shape)
    total = np.zeros(len(error))
    for factor in scales:
        starts = itertools.product(*(range(0, size, factor) for size in error.shape[1:-1]))
        squares, counts = np.zeros(len(error)), np.zeros(len(error))
        for start in starts:
            block = (slice(None), *(slice(i, i + factor) for i in start))
            axes = tuple(range(1, error.ndim - 1))
            count = mask[block].sum(axes)
            mean = np.where(mask[block] > 0, error[block], 0).sum(axes) / np.maximum(count, 1)
            squares += (count * mean**2).sum(1)
            counts += count.sum(1)
        total += factor * squares / np.maximum(counts, 1)
    return total


@pytest.mark.parametrize("shape", [(3, 12, 2), (3, 8, 4, 2), (2, 4, 8, 4, 1)])
@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4), (1, 4)])
def test_mean_squares_are_those_of_blocks(shape, scales):
    error = RNG.normal(size=shape).astype(np.float32) + np.float32(0.5)
    expected = by_blocks(error, scales)
    got = losses.multiscale_mean_square(error, scales)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(losses.multiscale_mean_square(error, scales[1:]), got)
    mask = RNG.random((*shape[:-1], 1)) < 0.4
    mask[0] = False
    got = losses.multiscale_mean_square(np.where(mask, error, np.nan), scales, mask)
    np.testing.assert_allclose(got, by_blocks(error, scales, mask), rtol=1e-6)
    assert got[0] == 0
    everywhere = losses.multiscale_mean_square(error, scales, np.ones((1,) * len(shape), bool))
    np.testing.assert_allclose(everywhere, expected, rtol=1e-6)


def test_a_sequence_that_ends_within_a_block_keeps_its_scale():
    # A constant error is as large at every scale, however much of a block counts.
    error = np.full((8, 8, 3), 0.5, np.float32)
    mask = np.arange(8)[None, :, None] <= np.arange(8)[:, None, None]
    got = losses.multiscale_mean_square(error, (1, 2, 4), mask)
    np.testing.assert_allclose(got, 7 * 0.25, rtol=1e-6)


def test_coarse_errors_are_emphasised():
    i, j = np.indices((8, 8))
    checks = (1.0 - 2 * ((i + j) % 2))[None, ..., None]  # mean zero in every block
    stripes = (1.0 - 2 * (i // 2 % 2))[None, ..., None]  # constant over blocks of 2, not of 4

    def slope(pattern):
        return jax.grad(lambda a: losses.multiscale_mean_square(a * pattern, (1, 2, 4))[0])(1.0)

    assert slope(jnp.ones((1, 8, 8, 1))) == pytest.approx(2 * (1 + 2 + 4))
    assert slope(jnp.asarray(stripes, jnp.float32)) == pytest.approx(2 * (1 + 2))
    assert slope(jnp.asarray(checks, jnp.float32)) == pytest.approx(2)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_white_errors_count_less_at_low_resolution(axes):
    error = RNG.normal(size=(1, *(round(2 ** (18 / axes)),) * axes, 1)).astype(np.float32)
    got = losses.multiscale_mean_square(error, (1, 2, 4))
    # Of 2**18 / 64 blocks the mean square has a standard deviation of 2.2 %.
    assert got[0] == pytest.approx(1 + 2 ** (1 - axes) + 4 ** (1 - axes), rel=0.05)


X0 = jax.random.normal(jax.random.key(7), (6, 4, 4, 2))
ROWS = ("x0", "eps", "v", "score", "flow")


def silent(params, x, noise_level, cond):
    return jnp.zeros_like(x)


def test_the_loss_is_weighted_like_the_plain_one():
    key = jax.random.key(0)
    _, eps, t = sample_xt(key, SCHEDULE, X0)  # the same addresses, so the same draw
    node, mask = SCHEDULE.at(t), np.tri(4)[None, ..., None]
    weighting = losses.min_snr()
    for batch in ({"x0": X0}, {"x0": X0, "mask": mask}):
        loss = losses.denoising_loss(silent, SCHEDULE, predictions.v, weighting, scales=(1, 2, 4))
        expected = by_blocks(predictions.v.target(X0, eps, node), (1, 2, 4), batch.get("mask"))
        expected *= np.asarray(weighting(predictions.v, node), np.float64)
        per_example, aux = loss(None, key, batch)
        np.testing.assert_allclose(per_example, expected, rtol=1e-5)
        np.testing.assert_array_equal(aux["loss"], per_example)


def test_full_resolution_alone_is_the_plain_loss():
    key, mask = jax.random.key(0), np.tri(4)[None, ..., None]
    for batch in ({"x0": X0}, {"x0": X0, "mask": mask}):
        _, eps, t = sample_xt(key, SCHEDULE, X0)
        target = jnp.square(predictions.eps.target(X0, eps, SCHEDULE.at(t)))
        plain = losses.masked_mean(target, batch.get("mask"))
        for scales in ((), (1,)):
            loss = losses.denoising_loss(silent, SCHEDULE, predictions.eps, scales=scales)
            np.testing.assert_array_equal(loss(None, key, batch)[0], plain)


def test_every_parameterization_sees_the_same_emphasis():
    def ratio(row):
        def network(params, x, noise_level, cond):
            node = SCHEDULE.at(noise_level)
            over = (-1, 1, 1, 1)
            alpha, sigma = node.alpha.reshape(over), node.sigma.reshape(over)
            x0 = 0.5 * jnp.roll(x, 1, axis=1)
            return row.target(x0, (x - alpha * x0) / sigma, node)

        plain, several = (
            losses.denoising_loss(network, SCHEDULE, row, scales=scales)(
                None, jax.random.key(0), {"x0": X0}
            )[0]
            for scales in ((), (1, 2, 4))
        )
        return several / plain

    expected = ratio(predictions.x0)
    assert expected.std() > 0.1
    for name in ROWS:
        np.testing.assert_allclose(ratio(getattr(predictions, name)), expected, rtol=1e-3)


def test_the_exact_denoiser_is_still_the_best():
    exact = denoisers.gaussian(np.zeros((2, 2, 1)), 0.5)
    coarse, fine = jnp.ones((1, 2, 2, 1)), jnp.asarray([[1.0, -1], [-1, 1]])[None, ..., None]

    def apply_fn(shift, x, noise_level, cond):
        return exact.denoiser(x, SCHEDULE.at(noise_level)).x0 + shift

    loss = jax.jit(losses.denoising_loss(apply_fn, SCHEDULE, predictions.x0, scales=(1, 2)))
    batch = {"x0": exact.sample(jax.random.key(0), 4096)}
    for pattern in (coarse, fine):
        value = [
            float(loss(shift * pattern, jax.random.key(1), batch)[0].mean())
            for shift in (-0.1, 0.0, 0.1)
        ]
        assert value[1] < min(value[0], value[2])


def test_scales_that_do_not_fit_are_refused():
    for scales in ((0, 1), (2, 1), (1, 1), (1.5,), (-2,)):
        with pytest.raises(ValueError, match="whole numbers from 1 on in ascending order"):
            losses.denoising_loss(silent, SCHEDULE, predictions.eps, scales=scales)
    with pytest.raises(ValueError, match=r"divide the data's spatial sizes \(4, 4\), got 3"):
        losses.denoising_loss(silent, SCHEDULE, predictions.eps, scales=(1, 3))(
            None, jax.random.key(0), {"x0": X0}
        )
    with pytest.raises(ValueError, match=r"spatial sizes \(\), got 2: leave it out$"):
        losses.multiscale_mean_square(jnp.ones((4, 3)), (1, 2))
    with pytest.raises(ValueError, match="mask must broadcast"):
        losses.multiscale_mean_square(jnp.ones((4, 4, 3)), (1, 2), jnp.ones((4, 4)))
