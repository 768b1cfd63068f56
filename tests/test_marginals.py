"""Solvers on data whose denoiser is exact, against closed forms at every node.

With Gaussian data the exact denoiser is affine, so a sampler keeps the states Gaussian and their
mean and variance follow a recursion, computed here in float64 from Bayes' rule. With a mixture in
one dimension the whole distribution is pushed through the steps by quadrature. Both hold for any
number of steps. At 1000 steps the samples are also compared with the process's own marginals.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import denoisers, grids, rng, sampling, schedules, solvers
from jaxdiff.base import Info, Node, Solver, SolverState
from jaxdiff.predictions import eps_from_x0

SCHEDULE = schedules.linear()
MEAN, STD = 0.6, 0.4
GAUSSIAN = denoisers.gaussian([MEAN], [STD])
WEIGHTS, MEANS, STDS = [0.5, 0.3, 0.2], [0.0, 1.0, -0.6], [0.2, 0.1, 0.3]
MIXTURE = denoisers.gaussian_mixture(WEIGHTS, np.array(MEANS)[:, None], STDS)

# Every solver, with eta: its noise as a share of the posterior's standard deviation. All of these
# are Song et al.'s family; "large" is the one whose variance is the step's own.
SOLVERS = {
    "ddpm": (solvers.ddpm(), 1.0),
    "ddpm_large": (solvers.ddpm("large"), "large"),
    "ddim": (solvers.ddim(), 0.0),
    "ddim_0.5": (solvers.ddim(0.5), 0.5),
    "ddim_1": (solvers.ddim(1.0), 1.0),
}
FALSE_ALARM = 1e-6  # of each test below, over all nodes it looks at


def wrong_ddpm():
    """The step of many notes: sqrt(1 - alpha_bar) instead of beta / sqrt(1 - alpha_bar)."""

    def step(keys, denoiser, state, now, next):
        x0 = denoiser(state.x, now).x0
        eps = eps_from_x0(x0, state.x, now)
        ratio = now.alpha / next.alpha
        v = now.sigma**2 - ratio**2 * next.sigma**2
        mean = (state.x - now.sigma * eps) / ratio
        std = jnp.sqrt(v) * next.sigma / now.sigma
        z = rng.normal(keys, mean.shape[1:], mean.dtype)
        return SolverState(mean + std * z), Info(x0, jnp.int32(1))

    return Solver(lambda x, node: SolverState(x), step)


def coefficients(now, next, eta):
    """x_s = a x_t + b x0 + tau z of one step, in float64 and from Bayes' rule."""
    (at, st), (as_, ss) = now, next
    ratio = at / as_
    v = st**2 - ratio**2 * ss**2
    if ss == 0:
        return 0.0, as_, 0.0
    if eta == "large":
        variance = 1 / (1 / ss**2 + ratio**2 / v)
        return variance * ratio / v, variance * as_ / ss**2, np.sqrt(v)
    tau = eta * np.sqrt(1 / (1 / ss**2 + ratio**2 / v))
    # q(x_s | x_t, x0) has mean as x0 + sqrt(ss² - tau²) (x_t - at x0) / st.
    along = np.sqrt(ss**2 - tau**2) / st
    return along, as_ - along * at, tau


def points(grid):
    return list(zip(np.float64(grid.alpha), np.float64(grid.sigma), strict=True))


def draw(exact, solver, grid, num, every=1, seed=0):
    """States at the nodes after the first, `(K, num)`, started from the true marginal."""

    @jax.jit
    def run():
        keys = rng.per_example(jax.random.key(seed), jnp.arange(num))
        noise = rng.normal(rng.stream(keys, rng.Stream.START), (1,))
        x0 = exact.sample(jax.random.key(seed + 1), num)
        x = grid.alpha[0] * x0 + grid.sigma[0] * noise
        _, record = sampling.walk(keys, exact.denoiser, solver, grid, x, trajectory_every=every)
        return record.x[..., 0], record.evaluations

    x, evaluations = run()
    assert int(evaluations) == grid.t.shape[0] - 1
    return np.asarray(x, np.float64)


def gaussian_recursion(grid, eta):
    """Mean and variance of the states at the nodes after the first."""
    nodes = points(grid)
    alpha, sigma = nodes[0]
    mean, var = alpha * MEAN, alpha**2 * STD**2 + sigma**2
    for now, next in itertools.pairwise(nodes):
        gain = now[0] * STD**2 / (now[0] ** 2 * STD**2 + now[1] ** 2)
        a, b, tau = coefficients(now, next, eta)
        slope = a + b * gain  # x0-hat = MEAN + gain (x - alpha MEAN)
        mean, var = slope * mean + b * MEAN * (1 - gain * now[0]), slope**2 * var + tau**2
        yield mean, var


def worst_score(states, moments):
    """The largest standard score of mean and variance over all nodes, and its bound."""
    num = states.shape[1]
    scores = []
    for x, (mean, var) in zip(states, moments, strict=True):
        scores += [
            abs(x.mean() - mean) / np.sqrt(var / num),
            abs(x.var(ddof=1) / var - 1) / np.sqrt(2 / num),
        ]
    return max(scores), stats.norm.isf(FALSE_ALARM / 2 / len(scores))


@pytest.mark.parametrize("num_steps", [1000, 50, 10])
@pytest.mark.parametrize("name", SOLVERS)
def test_gaussian_moments_at_every_node(name, num_steps):
    solver, eta = SOLVERS[name]
    grid = grids.trailing(SCHEDULE, num_steps)
    states = draw(GAUSSIAN, solver, grid, 4000)
    assert np.isfinite(states).all()
    score, bound = worst_score(states, gaussian_recursion(grid, eta))
    assert score < bound


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim_0.5", "ddim_1"])
def test_at_1000_steps_the_moments_are_those_of_the_process(name):
    # The sampler's own closed form is off the process's by at most 1/100 of a standard deviation
    # and 2 % of the variance here; the rest is sampling error.
    grid = grids.trailing(SCHEDULE, 1000)
    true = [(a * MEAN, a**2 * STD**2 + s**2) for a, s in points(grid)[1:]]
    for (mean, var), (m, v) in zip(gaussian_recursion(grid, SOLVERS[name][1]), true, strict=True):
        assert abs(mean - m) < 0.01 * np.sqrt(v)
        assert abs(var / v - 1) < 0.02
    states = draw(GAUSSIAN, SOLVERS[name][0], grid, 1000)
    score, bound = worst_score(states, true)
    assert score < bound


@pytest.mark.parametrize("num_steps", [1000, 50, 10])
def test_the_wrong_formula_fails_the_same_test(num_steps):
    grid = grids.trailing(SCHEDULE, num_steps)
    states = draw(GAUSSIAN, wrong_ddpm(), grid, 4000)
    score, bound = worst_score(states, gaussian_recursion(grid, 1.0))
    assert score > 3 * bound


def mixture_cdf(x, node):
    alpha, sigma = node
    x = np.asarray(x)
    return sum(
        w * stats.norm.cdf(x, alpha * m, np.hypot(alpha * s, sigma))
        for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
    )


def mixture_mean(x, node):
    """E[x0 | x] of the mixture, in float64."""
    alpha, sigma = node
    m, s = np.array(MEANS)[:, None], np.array(STDS)[:, None]
    var = (alpha * s) ** 2 + sigma**2
    share = np.array(WEIGHTS)[:, None] * stats.norm.pdf(x, alpha * m, np.sqrt(var))
    means = m + alpha * s**2 / var * (x - alpha * m)
    return (share * means).sum(0) / share.sum(0)


def quantiles(cdf, low, high, num):
    x = np.linspace(low, high, 6000)
    return np.interp((np.arange(num) + 0.5) / num, cdf(x), x)


def mixture_reference(grid, eta, num=2000):
    """Yields the cdf of the states at the nodes after the first, by quadrature over quantiles."""
    nodes = points(grid)
    q = quantiles(partial(mixture_cdf, node=nodes[0]), -6, 6, num)
    for now, next in itertools.pairwise(nodes):
        a, b, tau = coefficients(now, next, eta)
        means = np.sort(a * q + b * mixture_mean(q, now))
        if tau == 0:
            q = means
            levels = (np.arange(num) + 0.5) / num
            yield lambda x, q=q, levels=levels: np.interp(x, q, levels, left=0, right=1)
        else:
            x = np.linspace(means[0] - 6 * tau, means[-1] + 6 * tau, 800)
            values = stats.norm.cdf((x[:, None] - means) / tau).mean(1)
            q = np.interp((np.arange(num) + 0.5) / num, values, x)
            yield lambda y, x=x, values=values: np.interp(y, x, values, left=0, right=1)


def ks_bound(num, tests):
    """Of the Kolmogorov-Smirnov distance (Dvoretzky-Kiefer-Wolfowitz)."""
    return np.sqrt(np.log(2 * tests / FALSE_ALARM) / (2 * num))


@pytest.mark.parametrize("num_steps", [50, 10])
@pytest.mark.parametrize("name", SOLVERS)
def test_mixture_distribution_at_every_node(name, num_steps):
    solver, eta = SOLVERS[name]
    grid = grids.trailing(SCHEDULE, num_steps)
    states = draw(MIXTURE, solver, grid, 8000)
    distances = [
        stats.kstest(x, cdf).statistic
        for x, cdf in zip(states, mixture_reference(grid, eta), strict=True)
    ]
    # 0.003: the quadrature's own error, from doubling the number of quantiles.
    assert max(distances) < ks_bound(8000, num_steps) + 0.003


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim_0.5", "ddim_1"])
def test_mixture_at_1000_steps_is_the_process(name):
    grid = grids.trailing(SCHEDULE, 1000)
    states = draw(MIXTURE, SOLVERS[name][0], grid, 8000, every=20)
    nodes = points(grid)[20::20]
    distances = [
        stats.kstest(x, partial(mixture_cdf, node=node)).statistic
        for x, node in zip(states, nodes, strict=True)
    ]
    assert max(distances) < ks_bound(8000, len(nodes)) + 0.005  # 0.005: the error of 1000 steps


def test_the_wrong_formula_fails_on_the_mixture_too():
    grid = grids.trailing(SCHEDULE, 50)
    states = draw(MIXTURE, wrong_ddpm(), grid, 8000)
    distances = [
        stats.kstest(x, cdf).statistic
        for x, cdf in zip(states, mixture_reference(grid, 1.0), strict=True)
    ]
    assert max(distances) > 5 * ks_bound(8000, 50)


@pytest.mark.parametrize("num_steps", [1000, 7])
def test_ddim_eta_1_is_ddpm_small(num_steps):
    grid = grids.trailing(SCHEDULE, num_steps)
    a = draw(MIXTURE, solvers.ddim(1.0), grid, 500)
    b = draw(MIXTURE, solvers.ddpm("small"), grid, 500)
    np.testing.assert_allclose(a, b, atol=5e-5 if num_steps == 1000 else 5e-6)


def log_snr_grid(num_steps, low=-4.0, high=4.0):
    """A variance-preserving grid, uniform in log-SNR, interior."""
    log_snr = np.linspace(low, high, num_steps + 1)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))
    return Node(*(jnp.asarray(f, jnp.float32) for f in (log_snr, alpha, sigma)))


def test_ddim_is_of_order_one():
    # Along the exact flow of Gaussian data (x - alpha m) / sqrt(alpha² s² + sigma²) is constant.
    keys = rng.per_example(jax.random.key(0), jnp.arange(64))
    x = rng.normal(keys, (1,)) + 0.3
    errors, counts = [], np.array([10, 20, 40, 80, 160])
    for num_steps in counts:
        grid = log_snr_grid(num_steps)
        got, _ = jax.jit(
            lambda x, grid: sampling.walk(keys, GAUSSIAN.denoiser, solvers.ddim(), grid, x)
        )(x, grid)
        width = [np.sqrt(a**2 * STD**2 + s**2) for a, s in points(grid)]
        start, end = points(grid)[0], points(grid)[-1]
        scaled = (np.asarray(x, np.float64) - start[0] * MEAN) / width[0]
        exact = end[0] * MEAN + width[-1] * scaled
        errors.append(np.sqrt(np.mean((np.asarray(got) - exact) ** 2)))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(order - 1.0) < 0.1


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_a_point_mass_is_hit_exactly(name, num_steps):
    point = np.array([0.5, -0.25, 1.0])
    exact = denoisers.point_mass(point)
    grid = grids.trailing(SCHEDULE, num_steps)
    x = sampling.sample(jax.random.key(0), exact.denoiser, SOLVERS[name][0], grid, (4, 3))
    np.testing.assert_allclose(x, np.broadcast_to(point, (4, 3)), atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_from_zero_signal_are_finite(name):
    schedule = schedules.from_alphas_bar(np.linspace(0.99, 0, 10))
    grid = grids.trailing(schedule, 10)
    x = sampling.sample(jax.random.key(0), MIXTURE.denoiser, SOLVERS[name][0], grid, (50, 1))
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 3


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_keeps_the_contract(name):
    # Structure and types never change, the caller's jit compiles once, gradients are finite.
    solver, _ = SOLVERS[name]
    now, next = SCHEDULE.at(500), SCHEDULE.at(400)
    x = jax.random.normal(jax.random.key(0), (3, 1))
    keys = rng.per_example(jax.random.key(1), jnp.arange(3))
    state = solver.init(x, now)
    after, info = solver.step(keys, MIXTURE.denoiser, state, now, next)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [a.dtype for a in jax.tree.leaves(after)] == [a.dtype for a in jax.tree.leaves(state)]
    assert after.x.shape == info.x0.shape == x.shape
    assert info.evaluations.dtype == jnp.int32

    run = jax.jit(
        lambda key, x: sampling.walk(
            rng.per_example(key, jnp.arange(3)), MIXTURE.denoiser, solver,
            grids.trailing(SCHEDULE, 10), x,
        )[0]
    )  # fmt: skip
    run(jax.random.key(0), x)
    run(jax.random.key(1), x + 1)
    assert run._cache_size() == 1
    grads = jax.grad(lambda x: run(jax.random.key(0), x).sum())(x)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("name", ["ddpm", "ddim_0.5", "ddim"])
def test_batched_nodes_give_what_scalar_nodes_give(name):
    solver, _ = SOLVERS[name]
    x = jax.random.normal(jax.random.key(0), (2, 1))
    t, s = jnp.array([500, 30]), jnp.array([400, 0])
    keys = rng.per_example(jax.random.key(1), jnp.arange(2))
    both, _ = solver.step(
        keys, MIXTURE.denoiser, solver.init(x, SCHEDULE.at(t)), SCHEDULE.at(t), SCHEDULE.at(s)
    )
    for i in range(2):
        now, next = SCHEDULE.at(t[i]), SCHEDULE.at(s[i])
        key = rng.per_example(jax.random.key(1), jnp.array([i]))
        one, _ = solver.step(key, MIXTURE.denoiser, solver.init(x[i : i + 1], now), now, next)
        np.testing.assert_allclose(one.x, both.x[i : i + 1], rtol=1e-5, atol=1e-6)


def test_ddim_draws_nothing_at_eta_0():
    x = jax.random.normal(jax.random.key(0), (2, 1))
    now, next = SCHEDULE.at(500), SCHEDULE.at(400)
    one, two = (
        solvers.ddim().step(
            rng.per_example(jax.random.key(seed), jnp.arange(2)),
            MIXTURE.denoiser, SolverState(x), now, next,
        )[0].x
        for seed in (0, 1)
    )  # fmt: skip
    np.testing.assert_array_equal(one, two)


def test_bad_options_are_refused():
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
            solvers.ddim(eta)
    with pytest.raises(ValueError, match='"small" or "large"'):
        solvers.ddpm("medium")
