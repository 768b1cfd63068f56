"""EDM's samplers, as published, against ours (Karras et al. 2022, algorithms 1 and 2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import denoisers, grids, rng, sampling, schedules, solvers

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.random.default_rng(0).uniform(-1, 1, (3, 5))
STDS = np.array([0.2, 0.1, 0.3])


def d(x, sigma):
    """The denoiser D(x; sigma) of the mixture, in NumPy."""
    var = STDS**2 + sigma**2
    offset = x[:, None] - MEANS
    log_p = np.log(WEIGHTS) - 0.5 * (np.sum(offset**2, -1) / var + x.shape[-1] * np.log(var))
    share = np.exp(log_p - log_p.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return np.sum(share[..., None] * (MEANS + (STDS**2 / var)[:, None] * offset), 1)


def published(x, t, noise, s_churn=0.0, s_min=0.0, s_max=np.inf, s_noise=1.0):
    """Algorithm 2; algorithm 1 for s_churn = 0. `noise` has what is drawn in each step."""
    num_steps = len(t) - 1
    for i in range(num_steps):
        gamma = min(s_churn / num_steps, np.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noise[i]
        slope = (x_hat - d(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * slope
        if t[i + 1] != 0:
            end = (x - d(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (slope + end) / 2
    return x


def karras_sigmas(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Equation 5."""
    i = np.arange(num_steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + i / (num_steps - 1) * (low - high)) ** rho, 0.0)


@pytest.mark.parametrize(
    "churn",
    [None, {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}, {"s_churn": 3.0}],
    ids=["deterministic", "stochastic", "stochastic everywhere"],
)
@pytest.mark.parametrize("num_steps", [6, 18])
def test_edm_samplers_are_the_published_ones(num_steps, churn):
    with jax.enable_x64(True):
        exact = denoisers.gaussian_mixture(WEIGHTS, MEANS, STDS)
        schedule = schedules.edm()
        grid = grids.karras(schedule, num_steps)
        t = karras_sigmas(num_steps)
        np.testing.assert_allclose(grid.sigma, t, rtol=1e-9, atol=1e-12)
        options = dict(churn or {})
        s_noise = options.pop("s_noise", 1.0)
        if churn:
            grid = grids.churn(schedule, grid, **options)
        keys = rng.per_example(jax.random.key(0), jnp.arange(64))
        x = 80.0 * rng.normal(rng.stream(keys, rng.Stream.START), (5,), jnp.float64)
        got, record = jax.jit(
            lambda x: sampling.walk(keys, exact.denoiser, solvers.heun(), grid, x, up_noise=s_noise)
        )(x)
        # The noise of step i is that of the move of the grid that goes up from t_i.
        ups = np.flatnonzero(np.diff(np.asarray(grid.sigma)) > 0)
        noise = np.zeros((num_steps, 64, 5))
        for move in ups:
            i = int(np.argmin(np.abs(t - float(grid.sigma[move]))))
            noise[i] = rng.normal(rng.stream(keys, rng.Stream.UP, move), (5,), jnp.float64)
        want = published(np.asarray(x), t, noise, s_noise=s_noise, **options)
    assert len(ups) == (0 if not churn else np.sum((t > 0) & _within(t, options)))
    assert int(record.evaluations) == 2 * num_steps - 1
    difference = np.abs(np.asarray(got) - want).max()
    print(f"{num_steps} steps, {churn}: {difference:.1e}")
    assert difference < 1e-6


def _within(t, options):
    return (t >= options.get("s_min", 0.0)) & (t <= options.get("s_max", np.inf))
