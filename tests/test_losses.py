"""The denoising loss against its definition, and the weightings against the literature's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import denoisers, losses, predictions, rng, schedules, timesteps
from jaxdiff.process import sample_xt

SCHEDULE = schedules.linear()
X0 = jax.random.normal(jax.random.key(7), (6, 4, 4, 2))
ROWS = ("x0", "eps", "v", "score", "flow")


def zero_network(params, x, noise_level, cond):
    return jnp.zeros_like(x) + params


def test_loss_of_a_silent_network_is_the_mean_square_of_the_target():
    key = jax.random.key(0)
    _, eps, t = sample_xt(key, SCHEDULE, X0)  # the same addresses, so the same draw
    for name in ROWS:
        row = getattr(predictions, name)
        per_example, aux = losses.denoising_loss(zero_network, SCHEDULE, row)(0.0, key, {"x0": X0})
        target = np.asarray(row.target(X0, eps, SCHEDULE.at(t)), np.float64)
        np.testing.assert_array_equal(aux["t"], t)
        assert per_example.shape == (6,)
        assert per_example.dtype == jnp.float32
        np.testing.assert_allclose(per_example, (target**2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_the_network_sees_what_it_should():
    key, seen = jax.random.key(0), {}

    def apply_fn(params, x, noise_level, cond, dropout_keys):
        seen.update(x=x, t=noise_level, cond=cond, keys=dropout_keys)
        return x

    cond = jnp.arange(6)
    loss = losses.denoising_loss(apply_fn, SCHEDULE, predictions.eps, dropout=True)
    loss(None, key, {"x0": X0, "cond": cond})
    x_t, _, t = sample_xt(key, SCHEDULE, X0)
    np.testing.assert_allclose(seen["x"], x_t, rtol=1e-6)
    np.testing.assert_array_equal(seen["t"], t)
    assert seen["cond"] is cond
    expected = rng.stream(rng.per_example(key, jnp.arange(6)), rng.Stream.DROPOUT)
    np.testing.assert_array_equal(jax.random.key_data(seen["keys"]), jax.random.key_data(expected))


def test_the_loss_of_an_example_does_not_depend_on_the_batch():
    key = jax.random.key(0)
    loss = losses.denoising_loss(
        zero_network, SCHEDULE, predictions.v, timesteps=timesteps.stratified(6)
    )
    whole, _ = loss(0.0, key, {"x0": X0})
    for first in (0, 2, 4):
        batch = {"x0": X0[first : first + 2], "index": jnp.arange(first, first + 2)}
        np.testing.assert_allclose(loss(0.0, key, batch)[0], whole[first : first + 2], rtol=1e-6)


def test_weightings_are_weights_of_the_error_in_x0():
    # Each published weight of the x0 error, times |d x0 / d out|² of the parameterization.
    node = SCHEDULE.at(jnp.array([0, 200, 500, 999]))
    ratio = np.asarray(node.alpha, np.float64) ** 2 / np.asarray(node.sigma, np.float64) ** 2
    x = jnp.zeros((4, 1))
    for name in ROWS:
        row = getattr(predictions, name)
        slope = jax.jvp(lambda out: row.x0(out, x, node), (x,), (jnp.ones_like(x),))[1][:, 0]  # noqa: B023
        for weighting, weight in (
            (losses.snr, ratio),
            (losses.min_snr(5.0), np.minimum(ratio, 5)),
        ):
            np.testing.assert_allclose(
                weighting(row, node), weight * np.asarray(slope, np.float64) ** 2, rtol=1e-4
            )
        np.testing.assert_array_equal(losses.unit(row, node), np.ones(4))
    # Hang et al. 2023, table 1: min-SNR for eps and v.
    np.testing.assert_allclose(
        losses.min_snr(5.0)(predictions.eps, node), np.minimum(ratio, 5) / ratio, rtol=1e-4
    )
    np.testing.assert_allclose(
        losses.min_snr(5.0)(predictions.v, node), np.minimum(ratio, 5) / (ratio + 1), rtol=1e-4
    )


def test_weightings_are_finite_at_zero_signal():
    node = schedules.from_alphas_bar([0.5, 0.0]).at(1)
    for name in ("x0", "v", "flow"):
        for weighting in (losses.unit, losses.snr, losses.min_snr()):
            assert np.isfinite(weighting(getattr(predictions, name), node))


def test_min_snr_of_the_exact_denoiser_is_below_that_of_any_other():
    # The exact denoiser minimises every weighted loss: shifting it must cost.
    exact = denoisers.gaussian(np.zeros((4,)), 0.5)

    def apply_fn(shift, x, noise_level, cond):
        return exact.denoiser(x, SCHEDULE.at(noise_level)).x0 + shift

    x0 = exact.sample(jax.random.key(0), 4096)
    for weighting in (losses.unit, losses.snr, losses.min_snr()):
        loss = losses.denoising_loss(apply_fn, SCHEDULE, predictions.x0, weighting)
        value = [float(loss(s, jax.random.key(1), {"x0": x0})[0].mean()) for s in (-0.1, 0.0, 0.1)]
        assert value[1] < min(value[0], value[2])


def test_masked_coordinates_do_not_count():
    mask = np.zeros((6, 4, 4, 1), np.float32)
    mask[:, :2] = 1
    mask[5] = 0
    loss = losses.denoising_loss(lambda p, x, t, c: x, SCHEDULE, predictions.eps)
    key = jax.random.key(0)
    clean, _ = loss(None, key, {"x0": X0, "mask": mask})
    garbage = jnp.where(mask > 0, X0, jnp.inf)
    dirty, _ = loss(None, key, {"x0": garbage, "mask": mask})
    np.testing.assert_allclose(dirty, clean, rtol=1e-6)
    assert clean[5] == 0
    _, eps, _ = sample_xt(key, SCHEDULE, X0)
    x_t = sample_xt(key, SCHEDULE, X0)[0]
    expected = np.asarray((x_t - eps) ** 2)[:5, :2].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(clean[:5], expected, rtol=1e-5)
    grads = jax.grad(lambda v: losses.masked_mean(v, mask).sum())(X0)
    assert np.isfinite(grads).all()
    with pytest.raises(ValueError, match=r"mask must broadcast.*mask\[\.\.\., None\]"):
        losses.masked_mean(jnp.zeros((2, 5, 3)), jnp.ones((2, 5)))


@pytest.mark.parametrize("sampler", [timesteps.uniform, timesteps.stratified(64)])
def test_times_are_uniform_over_the_run(sampler):
    # Each of 64 positions over 500 steps; chi-square, false alarm 1e-6.
    keys = jax.random.split(jax.random.key(0), 500)
    t = jax.jit(jax.vmap(lambda key: sampler(key, jnp.arange(64), 40)))(keys)
    assert t.dtype == jnp.int32
    counts = np.bincount(np.asarray(t).ravel(), minlength=40)
    assert len(counts) == 40
    # Stratified counts vary less than independent ones, which chisquare's upper tail allows.
    assert stats.chisquare(counts).pvalue > 1e-6


def test_stratified_times_fill_every_stratum():
    t = timesteps.stratified(50)(jax.random.key(0), jnp.arange(50), 1000)
    np.testing.assert_array_equal(np.asarray(t) // 20, np.arange(50))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_strata"):
        timesteps.stratified(0)
    with pytest.raises(ValueError, match="gamma"):
        losses.min_snr(0)
    with pytest.raises(ValueError, match="singular"):
        losses.denoising_loss(zero_network, schedules.from_alphas_bar([0.5, 0]), predictions.eps)
    loss = losses.denoising_loss(zero_network, SCHEDULE, predictions.eps)
    with pytest.raises(TypeError, match="x0 must be floating"):
        loss(0.0, jax.random.key(0), {"x0": np.zeros((2, 4), np.uint8)})
