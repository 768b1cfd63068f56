"""Stochastic solvers on data whose denoiser is exact, against closed forms at every node.

With Gaussian data the exact denoiser is affine, so a sampler keeps the states Gaussian and their
mean and variance follow a recursion, computed here in float64 from Bayes' rule. With a mixture in
one dimension the whole distribution is pushed through the steps by quadrature. Both hold for any
number of steps. At 1000 steps the samples are also compared with the process's own marginals.
"""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxdiff import denoisers, grids, rng, sampling, solvers
from jaxdiff.base import Info, Solver, SolverState
from jaxdiff.predictions import eps_from_x0
from tests import quick_to_compile
from tests.solver_table import MEANS, MIXTURE, SCHEDULE, SOLVERS, STDS, WEIGHTS

MEAN, STD = 0.6, 0.4
GAUSSIAN = denoisers.gaussian([MEAN], [STD])
# Song et al.'s family, for which the samplers' own closed forms are known.
FAMILY = {
    name: (case.solver, case.share) for name, case in SOLVERS.items() if case.share is not None
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

    @partial(
        jax.jit, compiler_options=quick_to_compile.FULL if every > 1 or solver.one_path else None
    )
    def run():
        keys = rng.per_example(jax.random.key(seed), jnp.arange(num))
        noise = rng.normal(rng.stream(keys, rng.Stream.START), (1,))
        x0 = exact.sample(jax.random.key(seed + 1), num)
        x = grid.alpha[0] * x0 + grid.sigma[0] * noise
        _, record = sampling.walk(keys, exact.denoiser, solver, grid, x, trajectory_every=every)
        return record.x[..., 0]

    return np.asarray(run(), np.float64)


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


# Reading a path costs 19 draws a step; 10 steps say as much of it as 1000.
CASES = [
    (name, num_steps)
    for name, (solver, _) in FAMILY.items()
    for num_steps in (1000, 10)
    if num_steps < 1000 or not solver.one_path
]


@pytest.mark.parametrize(("name", "num_steps"), CASES)
def test_gaussian_moments_at_every_node(name, num_steps):
    solver, eta = FAMILY[name]
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
    for (mean, var), (m, v) in zip(gaussian_recursion(grid, FAMILY[name][1]), true, strict=True):
        assert abs(mean - m) < 0.01 * np.sqrt(v)
        assert abs(var / v - 1) < 0.02
    states = draw(GAUSSIAN, FAMILY[name][0], grid, 1000)
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


@cache  # several solvers have the same one
def mixture_reference(num_steps, eta, num=2000):
    """The cdfs of the states at the nodes after the first, by quadrature over quantiles."""
    nodes, cdfs = points(grids.trailing(SCHEDULE, num_steps)), []
    q = quantiles(partial(mixture_cdf, node=nodes[0]), -6, 6, num)
    for now, next in itertools.pairwise(nodes):
        a, b, tau = coefficients(now, next, eta)
        means = np.sort(a * q + b * mixture_mean(q, now))
        if tau == 0:
            q = means
            levels = (np.arange(num) + 0.5) / num
            cdfs.append(partial(np.interp, xp=q, fp=levels, left=0, right=1))
        else:
            x = np.linspace(means[0] - 6 * tau, means[-1] + 6 * tau, 800)
            values = special.ndtr((x[:, None] - means) / tau).mean(1)
            q = np.interp((np.arange(num) + 0.5) / num, values, x)
            cdfs.append(partial(np.interp, xp=x, fp=values, left=0, right=1))
    return cdfs


def distance(x, cdf):
    """The Kolmogorov-Smirnov distance; without the p-value, which takes longer."""
    return stats.kstest(x, cdf, method="asymp").statistic


def ks_bound(num, tests):
    """Of the Kolmogorov-Smirnov distance (Dvoretzky-Kiefer-Wolfowitz)."""
    return np.sqrt(np.log(2 * tests / FALSE_ALARM) / (2 * num))


@pytest.mark.parametrize("name", FAMILY)
def test_mixture_distribution_at_every_node(name):
    num_steps, (solver, eta) = 50, FAMILY[name]
    grid = grids.trailing(SCHEDULE, num_steps)
    states = draw(MIXTURE, solver, grid, 8000)
    distances = [
        distance(x, cdf) for x, cdf in zip(states, mixture_reference(num_steps, eta), strict=True)
    ]
    # 0.003: the quadrature's own error, from doubling the number of quantiles.
    assert max(distances) < ks_bound(8000, num_steps) + 0.003


# These have no closed form of their own.
OTHERS = ["sde_dpm_solver_pp_2m", "predictor_corrector", "corrected_ddim"]


@pytest.mark.parametrize("name", ["ddpm", "ddim", *OTHERS])
def test_mixture_at_many_steps_is_the_process(name):
    # 2M has in 250 steps the error that those of first order have in 1000.
    num_steps = 250 if SOLVERS[name].solver.one_path else 1000
    every = num_steps // 50
    grid = grids.trailing(SCHEDULE, num_steps)
    states = draw(MIXTURE, SOLVERS[name].solver, grid, 4000, every=every)
    nodes = points(grid)[every::every]
    distances = [
        distance(x, partial(mixture_cdf, node=node)) for x, node in zip(states, nodes, strict=True)
    ]
    assert max(distances) < ks_bound(4000, len(nodes)) + 0.005  # 0.005: the error of 1000 steps


def test_the_wrong_formula_fails_on_the_mixture_too():
    grid = grids.trailing(SCHEDULE, 50)
    states = draw(MIXTURE, wrong_ddpm(), grid, 8000)
    distances = [
        distance(x, cdf) for x, cdf in zip(states, mixture_reference(50, 1.0), strict=True)
    ]
    assert max(distances) > 5 * ks_bound(8000, 50)


@pytest.mark.parametrize("num_steps", [1000, 7])
def test_ddim_eta_1_is_ddpm_small(num_steps):
    grid = grids.trailing(SCHEDULE, num_steps)
    a = draw(MIXTURE, solvers.ddim(1.0), grid, 500)
    b = draw(MIXTURE, solvers.ddpm("small"), grid, 500)
    np.testing.assert_allclose(a, b, atol=5e-5 if num_steps == 1000 else 5e-6)


def test_second_order_noise_is_right_where_first_order_noise_is_not_yet():
    # At 40 steps the end's distribution is off by first order for ddpm, hardly for 2M.
    grid = grids.trailing(SCHEDULE, 40)
    true = partial(mixture_cdf, node=(1.0, 0.0))
    first, second = (
        distance(draw(MIXTURE, SOLVERS[name].solver, grid, 20000)[-1], true)
        for name in ("ddpm", "sde_dpm_solver_pp_2m")
    )
    assert second < first


def test_langevin_steps_alone_have_the_closed_form_of_a_linear_recursion():
    # At one node, on Gaussian data: x <- (1 - e/c) (x - m) + m + sqrt(2e) z.
    node, steps, snr = SCHEDULE.at(300), 6, 0.3
    stay = Solver(
        lambda x, node: SolverState(x),
        lambda keys, denoiser, state, now, next: (state, Info(state.x, 0)),
    )
    solver = solvers.predictor_corrector(stay, steps, snr)
    keys = rng.per_example(jax.random.key(5), jnp.arange(20000))
    start = jnp.full((20000, 1), 2.0)
    state, info = jax.jit(
        lambda: solver.step(keys, GAUSSIAN.denoiser, solver.init(start, node), node, node)
    )()
    assert int(info.evaluations) == steps
    alpha, sigma = float(node.alpha), float(node.sigma)
    c, e = (alpha * STD) ** 2 + sigma**2, 2 * (snr * sigma) ** 2
    mean, var = 2.0, 0.0
    for _ in range(steps):
        kept = 1 - e / c
        mean, var = alpha * MEAN + kept * (mean - alpha * MEAN), kept**2 * var + 2 * e
    score, bound = worst_score(np.asarray(state.x, np.float64).T, [(mean, var)])
    assert score < bound
