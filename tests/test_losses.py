"""The denoising loss and its options against their definitions."""

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


def test_min_snr_of_the_exact_denoiser_is_below_that_of_any_other():
    # The exact denoiser minimises every weighted loss: shifting it must cost.
    exact = denoisers.gaussian(np.zeros((4,)), 0.5)

    def apply_fn(shift, x, noise_level, cond):
        return exact.denoiser(x, SCHEDULE.at(noise_level)).x0 + shift

    x0 = exact.sample(jax.random.key(0), 4096)
    for weighting in (losses.unit, losses.snr, losses.min_snr()):
        loss = jax.jit(losses.denoising_loss(apply_fn, SCHEDULE, predictions.x0, weighting))
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


def test_masked_coordinates_leave_the_gradient_finite():
    mask = np.ones((6, 4, 4, 1), np.float32)
    mask[:, :2] = 0
    garbage = jnp.where(mask > 0, X0, jnp.nan)

    def mean_loss(params, x0):
        loss = losses.denoising_loss(two_headed, SCHEDULE, predictions.eps, vlb_weight=0.01)
        return loss(params, jax.random.key(0), {"x0": x0, "mask": mask})[0].mean()

    params = {"scale": jnp.float32(0.5), "fraction": jnp.float32(0.3)}
    gradient = jax.jit(jax.grad(mean_loss))
    grads, expected = gradient(params, garbage), gradient(params, X0)
    for name in params:
        assert expected[name] != 0
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5)


def test_continuous_times_are_told_as_they_are():
    key, schedule, seen = jax.random.key(0), schedules.rectified_flow(), {}

    def apply_fn(params, x, noise_level, cond):
        seen.update(x=x, t=noise_level)
        return jnp.zeros_like(x)

    loss = losses.denoising_loss(apply_fn, schedule, predictions.flow)
    per_example, aux = loss(None, key, {"x0": X0})
    t = np.asarray(timesteps.uniform(key, jnp.arange(6), schedule))
    assert t.dtype == np.float32
    np.testing.assert_array_equal(seen["t"], t)
    np.testing.assert_array_equal(aux["t"], t)
    eps = sample_xt(key, SCHEDULE, X0)[1]  # the same stream
    shape = (6, 1, 1, 1)
    expected = (1 - t.reshape(shape)) * X0 + t.reshape(shape) * eps
    np.testing.assert_allclose(seen["x"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(per_example, np.square(eps - X0).mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(aux["loss"], per_example)


def seen_conditions(cond, null_cond, probability, index=None, key=0):
    seen = {}

    def apply_fn(params, x, noise_level, cond):
        seen["cond"] = cond
        return x

    loss = losses.denoising_loss(
        apply_fn, SCHEDULE, predictions.eps, cond_dropout=probability, null_cond=null_cond
    )

    @jax.jit
    def draw(cond, index):
        x0 = jnp.zeros((index.shape[0], 2))
        loss(None, jax.random.key(key), {"x0": x0, "cond": cond, "index": index})
        return seen["cond"]

    return draw(cond, jnp.arange(jax.tree.leaves(cond)[0].shape[0]) if index is None else index)


def test_conditions_are_dropped_whole_with_their_probability():
    # Binomial, false alarm 1e-6.
    size = 4000
    cond = {
        "label": jnp.arange(size) % 10,
        "sequence": jax.random.normal(jax.random.key(3), (size, 3, 2)),
    }
    null = {"label": 10, "sequence": jnp.full((1, 2), 7.0)}
    got = seen_conditions(cond, null, 0.3)
    dropped = np.asarray(got["label"]) == 10
    assert stats.binomtest(int(dropped.sum()), size, 0.3).pvalue > 1e-6
    assert got["label"].dtype == cond["label"].dtype
    np.testing.assert_array_equal(got["label"], np.where(dropped, 10, cond["label"]))
    expected = np.where(dropped[:, None, None], np.float32(7), cond["sequence"])
    np.testing.assert_array_equal(got["sequence"], expected)
    # Another key drops others.
    other = np.asarray(seen_conditions(cond, null, 0.3, key=1)["label"]) == 10
    assert stats.binomtest(int((dropped & other).sum()), size, 0.09).pvalue > 1e-6
    np.testing.assert_array_equal(seen_conditions(cond, null, 1.0)["label"], np.full(size, 10))


def test_dropping_does_not_depend_on_the_batch():
    cond = jnp.arange(64)
    whole = seen_conditions(cond, 64, 0.5)
    for first in (0, 16, 48):
        part = slice(first, first + 16)
        got = seen_conditions(cond[part], 64, 0.5, index=jnp.arange(first, first + 16))
        np.testing.assert_array_equal(got, whole[part])
    assert 10 < np.sum(np.asarray(whole) == 64) < 54


def test_offset_noise_is_shared_over_the_axes_of_space():
    # Covariance of eps: 1 on the diagonal, and strength² among the places of one channel.
    # 20,000 draws; false alarm of each of 36 entries 4e-8.
    strength, size, seen = 0.6, 20_000, {}

    def apply_fn(params, x, noise_level, cond):
        seen.update(x=x, t=noise_level)
        return jnp.zeros_like(x)

    loss = losses.denoising_loss(apply_fn, SCHEDULE, predictions.eps, offset_noise=strength)

    @jax.jit
    def draw(x0):
        per_example, _ = loss(None, jax.random.key(0), {"x0": x0})
        return per_example, seen["x"] / SCHEDULE.at(seen["t"]).over(x0).sigma

    per_example, eps = draw(jnp.zeros((size, 3, 1, 2)))
    eps = np.asarray(eps, np.float64).reshape(size, 6)
    expected = np.eye(6) + strength**2 * np.kron(np.ones((3, 3)), np.eye(2))
    # The variance of a product of Gaussians.
    diagonal = np.diag(expected)
    error = np.sqrt((np.outer(diagonal, diagonal) + expected**2) / size)
    assert np.all(np.abs(eps.T @ eps / size - expected) < 5.5 * error)
    # The target is this noise.
    np.testing.assert_allclose(per_example, (eps**2).mean(axis=1), rtol=1e-4)


def test_the_network_sees_its_own_prediction_in_half_of_the_examples():
    # Output = p + 2 x0_prev, which for x0 prediction is p in the first pass and p or 3 p in the
    # second; the gradient takes x0_prev for a constant.
    size, seen = 2000, []
    x0 = jax.random.normal(jax.random.key(5), (size, 3, 2))

    def apply_fn(params, x, noise_level, cond, dropout_keys):
        seen.append((x, dropout_keys))
        return params + 2 * x[..., 2:]

    loss = losses.denoising_loss(
        apply_fn, SCHEDULE, predictions.x0, dropout=True, self_condition=True
    )

    @jax.jit
    def run(p):
        per_example, _ = loss(p, jax.random.key(0), {"x0": x0})
        return per_example, [(x, jax.random.key_data(keys)) for x, keys in seen[-2:]]

    per_example, ((first, first_keys), (second, second_keys)) = run(jnp.float32(0.5))
    assert first.shape == second.shape == (size, 3, 4)
    np.testing.assert_array_equal(first[..., :2], second[..., :2])
    np.testing.assert_array_equal(first[..., 2:], 0)
    shown = np.asarray(second[:, 0, 2]) > 0.25
    expected = np.where(shown, np.float32(0.5), np.float32(0))[:, None, None]
    np.testing.assert_allclose(second[..., 2:], np.broadcast_to(expected, x0.shape), rtol=1e-6)
    assert stats.binomtest(int(shown.sum()), size, 0.5).pvalue > 1e-6
    output = np.where(shown, 1.5, 0.5)[:, None, None]
    np.testing.assert_allclose(per_example, ((output - x0) ** 2).mean(axis=(1, 2)), rtol=1e-4)
    keys = np.concatenate([first_keys, second_keys])
    assert len(np.unique(keys, axis=0)) == 2 * size
    grad = jax.jit(jax.grad(lambda p: run(p)[0].sum()))(jnp.float32(0.5))
    np.testing.assert_allclose(grad, 2 * np.sum((output - x0).mean(axis=(1, 2))), rtol=1e-4)


def two_headed(params, x, noise_level, cond):
    fraction = jnp.full_like(x, params["fraction"])
    return jnp.concatenate([params["scale"] * x, 2 * fraction - 1], axis=-1)


def test_the_learned_variance_is_trained_by_the_bound_in_closed_form():
    # T L_t in bits per dimension from scipy's float64, at index 0 and others.
    schedule, weight = schedules.linear(4, 0.05, 0.3), 0.01
    x0 = np.asarray(jnp.round(jnp.clip(X0 / 2, -1, 1) * 127.5 + 127.5) / 127.5 - 1)
    batch, key = {"x0": jnp.asarray(np.concatenate([x0, x0]))}, jax.random.key(0)
    plain = losses.denoising_loss(
        lambda *args: two_headed(*args)[..., :2], schedule, predictions.eps
    )
    hybrid = losses.denoising_loss(two_headed, schedule, predictions.eps, vlb_weight=weight)
    plain, hybrid = jax.jit(plain), jax.jit(hybrid)
    x_t, _, t = (np.asarray(a, np.float64) for a in sample_xt(key, schedule, batch["x0"]))
    t = t.astype(int)
    assert 0 < (t == 0).sum() < 12

    abar = np.cumprod(1 - np.linspace(0.05, 0.3, 4))
    now = abar[t].reshape(12, 1, 1, 1)
    before = np.where(t > 0, abar[t - 1], 1.0).reshape(12, 1, 1, 1)
    is_first = (t == 0).reshape(12, 1, 1, 1)
    beta = 1 - now / before
    second = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])
    small = np.where(is_first, second, beta * (1 - before) / (1 - now))
    clean = np.asarray(batch["x0"], np.float64)
    x0_hat = (x_t - np.sqrt(1 - now) * 0.7 * x_t) / np.sqrt(now)
    gap = np.sqrt(before) * beta / (1 - now) * (clean - x0_hat)
    upper = np.where(clean > 0.999, np.inf, clean + 1 / 255)
    lower = np.where(clean < -0.999, -np.inf, clean - 1 / 255)
    for fraction in (0.0, 0.3, 1.0):
        std = np.sqrt(small ** (1 - fraction) * beta**fraction)
        kl = np.log(std / np.sqrt(small)) + (small + gap**2) / (2 * std**2) - 0.5
        likelihood = stats.norm.cdf(upper, x0_hat, std) - stats.norm.cdf(lower, x0_hat, std)
        nats = np.where(is_first, -np.log(likelihood), kl).mean(axis=(1, 2, 3))
        params = {"scale": jnp.float32(0.7), "fraction": jnp.float32(fraction)}
        expected = plain(params, key, batch)[0] + weight * 4 * nats / np.log(2)
        np.testing.assert_allclose(hybrid(params, key, batch)[0], expected, rtol=1e-4)


def test_the_bound_trains_the_variance_and_nothing_else():
    params = {"scale": jnp.float32(0.7), "fraction": jnp.float32(0.4)}

    def gradient(vlb_weight):
        loss = losses.denoising_loss(
            two_headed, SCHEDULE, predictions.v, losses.min_snr(), vlb_weight=vlb_weight
        )
        mean_loss = lambda p: loss(p, jax.random.key(0), {"x0": X0})[0].mean()  # noqa: E731
        return jax.jit(jax.grad(mean_loss))(params)

    small, large = gradient(0.001), gradient(0.1)
    np.testing.assert_allclose(small["scale"], large["scale"], rtol=1e-6)
    assert small["fraction"] != 0
    np.testing.assert_allclose(100 * small["fraction"], large["fraction"], rtol=1e-4)


def test_a_loss_aware_sampler_weights_the_loss_but_not_what_it_learns_from():
    schedule, sampler = schedules.linear(8), timesteps.loss_aware(num_terms=1)
    history = sampler.update(sampler.init(schedule), jnp.arange(8), jnp.arange(1.0, 9.0))
    loss = losses.denoising_loss(zero_network, schedule, predictions.eps, timesteps=sampler)
    key = jax.random.key(0)
    per_example, aux = loss(0.0, key, {"x0": X0, "history": history})
    t, weight = sampler.sample(key, jnp.arange(6), schedule, history)
    assert len(np.unique(weight)) > 2
    np.testing.assert_array_equal(aux["t"], t)
    eps = sample_xt(key, SCHEDULE, X0)[1]
    np.testing.assert_allclose(aux["loss"], np.square(eps).mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(per_example, weight * aux["loss"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"needs batch\['history'\]"):
        loss(0.0, key, {"x0": X0})


def test_every_option_compiles_and_is_a_function_of_the_address():
    # All at once, whole and in two halves.
    def apply_fn(params, x, noise_level, cond, dropout_keys):
        drop = rng.uniform(dropout_keys) + cond
        return x * params + drop[:, None, None, None]

    loss = jax.jit(losses.denoising_loss(
        apply_fn, SCHEDULE, predictions.v, losses.p2(), timesteps.stratified(6), dropout=True,
        cond_dropout=0.5, null_cond=-1.0, offset_noise=0.1, self_condition=True, vlb_weight=0.001,
    ))  # fmt: skip
    batch = {"x0": X0, "cond": jnp.arange(6.0), "index": jnp.arange(6), "mask": X0 < 1}
    whole, _ = loss(0.3, jax.random.key(0), batch)
    assert np.isfinite(whole).all()
    halves = [
        loss(0.3, jax.random.key(0), {k: v[part] for k, v in batch.items()})[0]
        for part in (slice(0, 3), slice(3, 6))
    ]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cond_dropout": 1.5, "null_cond": 0}, r"cond_dropout must lie in \[0, 1\]"),
        ({"cond_dropout": 0.1}, "cond_dropout needs null_cond"),
        ({"offset_noise": -0.1}, "offset_noise must not be negative"),
        ({"vlb_weight": 0.0}, "vlb_weight must be positive"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        losses.denoising_loss(zero_network, SCHEDULE, predictions.eps, **options)


def test_batches_and_networks_that_do_not_fit_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="discrete schedule, got a continuous one"):
        losses.denoising_loss(
            zero_network, schedules.vp_linear(), predictions.eps, vlb_weight=0.001
        )
    drop = {"cond_dropout": 0.5, "null_cond": {"label": jnp.zeros(3)}}
    loss = losses.denoising_loss(zero_network, SCHEDULE, predictions.eps, **drop)
    for cond, match in (
        (None, r"needs batch\['cond'\]"),
        (jnp.zeros(6), "structure of one example's condition"),
        ({"label": jnp.zeros((6, 2))}, "null_cond must broadcast"),
    ):
        with pytest.raises(ValueError, match=match):
            loss(0.0, key, {"x0": X0, "cond": cond})
    loss = losses.denoising_loss(zero_network, SCHEDULE, predictions.eps, vlb_weight=0.001)
    with pytest.raises(ValueError, match="must have 4 output channels"):
        loss(0.0, key, {"x0": X0})
    loss = losses.denoising_loss(zero_network, SCHEDULE, predictions.eps)
    with pytest.raises(TypeError, match="x0 must be floating"):
        loss(0.0, key, {"x0": np.zeros((2, 4), np.uint8)})
    with pytest.raises(ValueError, match="singular"):
        losses.denoising_loss(zero_network, schedules.from_alphas_bar([0.5, 0]), predictions.eps)
