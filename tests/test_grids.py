"""Grids against the published formulas in float64, and that bad ones are refused."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxdiff import denoisers, grids, rng, sampling, schedules, solvers

BY_TIME = {
    "trailing": grids.trailing,
    "leading": grids.leading,
    "linspace": grids.linspace,
    "quadratic": grids.quadratic,
    "beta": grids.beta,
}
BY_NOISE = {"uniform_log_snr": grids.uniform_log_snr, "karras": grids.karras}
EVEN = {name: BY_TIME[name] for name in ("trailing", "leading", "linspace")}
CONTINUOUS = {
    "vp_linear": schedules.vp_linear(),
    "vp_cosine": schedules.vp_cosine(),
    "sub_vp": schedules.sub_vp(),
    "rectified_flow": schedules.rectified_flow(),
    "edm": schedules.edm(),
}
LINEAR = schedules.linear()
ZERO_SNR = schedules.zero_terminal_snr(LINEAR)


def ratios(grid):
    with np.errstate(divide="ignore"):
        return np.float64(grid.sigma) / np.float64(grid.alpha)


def in_float64(make):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, make())


@pytest.mark.parametrize("name", BY_TIME)
@given(data=st.data())
def test_any_number_of_steps_gives_a_grid_from_noise_to_data(name, data):
    total = data.draw(st.integers(1, 300))
    num_steps = data.draw(st.integers(1, total))
    schedule = schedules.linear(total, 1e-4, 0.02)
    grid = BY_TIME[name](schedule, num_steps)
    t = np.asarray(grid.t)
    assert t.dtype == np.int32
    assert t.shape == (num_steps + 1,)
    assert np.all(np.diff(t) < 0)
    assert t[0] <= total - 1
    assert t[-1] == -1
    assert (np.asarray(grid.alpha)[-1], np.asarray(grid.sigma)[-1]) == (1.0, 0.0)
    for of_grid, of_schedule in (
        (grid.alpha, schedule.nodes.alpha), (grid.sigma, schedule.nodes.sigma)
    ):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(of_grid)[:-1], np.asarray(of_schedule)[t[:-1]])
    if name in EVEN:
        # Strides differ by at most one, so no part of the schedule is left out.
        strides = np.diff(t[:-1])
        assert not strides.size or strides.max() - strides.min() <= 1
    else:
        assert t[0] == total - 1
        assert num_steps == 1 or t[-2] == 0
    if num_steps == total:
        np.testing.assert_array_equal(t, np.arange(total - 1, -2, -1))


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
@pytest.mark.parametrize("name", ["trailing", "linspace", "quadratic", "beta", *BY_NOISE])
@settings(max_examples=6)
@given(num_steps=st.integers(1, 200), clean=st.booleans())
def test_continuous_schedules_have_the_same_grids(schedule, name, num_steps, clean):
    options = {"sigma_max": 70.0} if name in BY_NOISE and schedule.ends_at_zero_snr else {}
    make = (BY_TIME | BY_NOISE)[name]
    grid = in_float64(lambda: make(schedule, num_steps, clean=clean, **options))
    assert grid.t.shape == (num_steps + clean,)
    assert grid.t.dtype == grid.alpha.dtype == np.float64
    r, noisy = ratios(grid), slice(0, num_steps)
    assert np.all(np.diff(r) < 0)
    assert np.all(grid.sigma[noisy] > 0)
    if clean:
        assert (grid.t[-1], grid.alpha[-1], grid.sigma[-1]) == (0.0, 1.0, 0.0)
    first = 70.0 if options else ratios(schedule.at(1.0))
    np.testing.assert_allclose(r[0], first, rtol=1e-4)
    # t, alpha and sigma are those of one point of the schedule, of whatever family.
    assert np.all((grid.t >= 0) & (grid.t <= 1))
    padded = np.pad(grid.t[noisy], (0, 200 - num_steps), mode="edge")  # one compilation for all
    node = in_float64(lambda: schedule.at(jnp.asarray(padded))[:num_steps])
    np.testing.assert_allclose(grid.alpha[noisy], node.alpha, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(grid.sigma[noisy], node.sigma, rtol=1e-6)


def test_spacings_are_those_of_the_literature():
    # Lin et al. 2023, table 2 (their t counts from 1).
    tables = {
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    }
    for name, expected in tables.items():
        np.testing.assert_array_equal(BY_TIME[name](LINEAR, 10).t[:-1] + 1, expected)
    squares = [round(i**2 * 999 / 81) for i in range(9, -1, -1)]
    np.testing.assert_array_equal(grids.quadratic(LINEAR, 10).t[:-1], squares)
    flow = schedules.rectified_flow()
    np.testing.assert_allclose(grids.trailing(flow, 4).t, [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(grids.linspace(flow, 3).t, [1, 0.5005, 0.001, 0])
    np.testing.assert_allclose(grids.linspace(schedules.edm(), 3).t, [1, 0.5, 0, 0])
    np.testing.assert_allclose(grids.linspace(flow, 3, end=0.2).t, [1, 0.6, 0.2, 0])
    assert grids.linspace(LINEAR, 3, end=199).t.tolist() == [999, 599, 199, -1]


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (0.5, 2.0)])
def test_beta_is_at_the_quantiles(a, b):
    flow = schedules.rectified_flow()
    grid = in_float64(lambda: grids.beta(flow, 20, a, b, end=0.01))
    expected = 0.01 + 0.99 * stats.beta.ppf(np.linspace(1, 0, 20), a, b)
    np.testing.assert_allclose(grid.t[:-1], expected, rtol=1e-9, atol=1e-12)
    whole = grids.beta(LINEAR, 20, a, b).t[:-1]
    np.testing.assert_allclose(whole, 999 * (expected - 0.01) / 0.99, atol=1.01)


@given(
    num_steps=st.integers(2, 300),
    rho=st.floats(1, 20),
    sigma_min=st.floats(1e-3, 1e-1),
    sigma_max=st.floats(1, 90),
)
@settings(max_examples=20)
def test_karras_is_equation_5(num_steps, rho, sigma_min, sigma_max):
    schedule = schedules.edm(1e-3, 90.0)
    grid = in_float64(
        lambda: grids.karras(schedule, num_steps, rho, sigma_max=sigma_max, sigma_min=sigma_min)
    )
    i = np.arange(num_steps)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    expected = (top + i / (num_steps - 1) * (bottom - top)) ** rho
    np.testing.assert_allclose(grid.sigma[:-1], expected, rtol=1e-10)
    np.testing.assert_array_equal(grid.alpha, 1)


def test_the_default_karras_grid_is_the_papers():
    grid = grids.karras(schedules.edm(), 18)
    assert grid.sigma.dtype == jnp.float32
    np.testing.assert_allclose(grid.sigma[:2], [80, 57.586], rtol=1e-5)
    np.testing.assert_allclose(grid.sigma[-2:], [0.002, 0], rtol=1e-6)
    np.testing.assert_allclose(grid.t[:-1], 1 - np.arange(18) / 17, atol=1e-6)


@pytest.mark.parametrize("name", BY_NOISE)
@pytest.mark.parametrize("num_steps", [1, 2, 10, 3000])
def test_on_a_discrete_schedule_they_lie_at_fractional_indices(name, num_steps):
    grid = in_float64(lambda: BY_NOISE[name](LINEAR, num_steps))
    np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1, rtol=1e-12)
    assert np.all(np.diff(ratios(grid)) < 0)
    assert grid.t[0] == 999
    if num_steps > 1:
        assert grid.t[-2] == 0
        log_snr = -2 * np.log(ratios(grid)[:-1])
        root = log_snr if name == "uniform_log_snr" else np.exp(-log_snr / 14)
        np.testing.assert_allclose(np.diff(root), np.diff(root).mean(), rtol=1e-6)
    expected = LINEAR.time(-2 * np.log(ratios(grid)[:-1]))
    np.testing.assert_allclose(grid.t[:-1], expected, atol=0.01)
    assert grids.exponential is grids.uniform_log_snr


def test_a_fractional_index_is_the_log_snr_between():
    grid = in_float64(lambda: grids.from_timesteps(LINEAR, [999.0, 500.25, 500, 0.5]))
    assert grid.t.tolist() == [999, 500.25, 500, 0.5, -1]
    alpha, sigma = (np.float64(a) for a in (LINEAR.nodes.alpha, LINEAR.nodes.sigma))
    table = 2 * np.log(alpha / sigma)
    expected = [0.75 * table[500] + 0.25 * table[501], (table[0] + table[1]) / 2]
    np.testing.assert_allclose(-2 * np.log(ratios(grid)[[1, 3]]), expected, rtol=1e-12)
    np.testing.assert_allclose((grid.alpha**2 + grid.sigma**2)[[1, 3]], 1, rtol=1e-12)
    np.testing.assert_array_equal(grid.alpha[[0, 2]], alpha[[999, 500]])
    # At a node without signal only the whole index means something.
    assert float(grids.from_timesteps(ZERO_SNR, [999, 3.5]).alpha[0]) == 0
    with pytest.raises(ValueError, match="no log-SNR between the last two indices, 998 and 999"):
        grids.from_timesteps(ZERO_SNR, [998.5, 3])


def test_from_sigmas_is_log_linear():
    # The levels of Sabour et al. 2024 for Stable Diffusion 1.5, in ten steps.
    sigmas = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    schedule = schedules.scaled_linear()
    grid = in_float64(lambda: grids.from_sigmas(schedule, sigmas))
    np.testing.assert_allclose(ratios(grid)[1:-2], sigmas[1:-1], rtol=1e-9)
    # Its ends are the schedule's, rounded.
    assert grid.t[[0, -2]].tolist() == [999, 0]
    grid = in_float64(lambda: grids.from_sigmas(schedules.edm(), sigmas, 21))
    np.testing.assert_allclose(grid.sigma[:-1:2], sigmas, rtol=1e-9)
    middles = np.sqrt(np.array(sigmas[1:]) * sigmas[:-1])
    np.testing.assert_allclose(grid.sigma[1:-1:2], middles, rtol=1e-9)


def test_one_step_starts_where_noise_is():
    for make in (grids.trailing, grids.linspace, grids.quadratic, grids.beta):
        assert make(LINEAR, 1).t.tolist() == [999, -1]
    assert grids.karras(LINEAR, 1).t.tolist() == [999, -1]


def test_a_grid_can_end_before_clean_data():
    grid = grids.trailing(LINEAR, 10, clean=False)
    assert grid.t.shape == (10,)
    assert int(grid.t[-1]) == 99
    assert float(grid.sigma[-1]) > 0
    assert grids.karras(LINEAR, 10, clean=False).t.shape == (10,)


@pytest.mark.parametrize("spacing", BY_TIME.values(), ids=BY_TIME)
@pytest.mark.parametrize("num_steps", [0, -1, 11, 2.5, True, None])
def test_bad_step_counts_are_refused(spacing, num_steps):
    with pytest.raises(ValueError, match="integer from 1 to the schedule's 10"):
        spacing(schedules.linear(10), num_steps)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True, None])
def test_bad_step_counts_are_refused_where_there_is_no_most(num_steps):
    for make in (grids.trailing, grids.linspace, *BY_NOISE.values()):
        with pytest.raises(ValueError, match="num_steps must be a positive integer"):
            make(schedules.edm(), num_steps)


@pytest.mark.parametrize(
    "timesteps", [[], [3, 3], [1, 2], [10, 0], [5, -1], [9.5], [[1]], [math.nan], ["a"], [True]]
)
def test_bad_timesteps_are_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must"):
        grids.from_timesteps(schedules.linear(10), timesteps)


def test_bad_times_of_continuous_schedules_are_refused():
    flow = schedules.rectified_flow()
    for times in ([1.5, 0.5], [0.5, 0.5], [0.5, -0.1]):
        with pytest.raises(ValueError, match="from at most 1 to at least 0"):
            grids.from_timesteps(flow, times)
    with pytest.raises(ValueError, match=r"at t = 0.0 data is clean: leave it out"):
        grids.from_timesteps(flow, [1.0, 0.0])
    assert grids.from_timesteps(schedules.edm(), [1.0, 0.0]).sigma.shape == (3,)
    with pytest.raises(ValueError, match="in continuous time is clean data itself"):
        grids.leading(flow, 5)
    for end in (1.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"end must be a time in \[0, 1\)"):
            grids.linspace(flow, 5, end=end)
    for end in (1000, -1, 0.5):
        with pytest.raises(ValueError, match="end must be an index from 0 to 999"):
            grids.quadratic(LINEAR, 5, end=end)


def test_bad_noise_levels_are_refused():
    for schedule in (ZERO_SNR, schedules.rectified_flow()):
        with pytest.raises(ValueError, match=r"starts from zero signal.*give sigma_max"):
            grids.karras(schedule, 10)
        assert grids.trailing(schedule, 10).alpha[0] == 0
    for options in ({"sigma_max": 1e4}, {"sigma_min": 1e-5}, {"sigma_max": -1.0},
                    {"sigma_min": math.nan}):  # fmt: skip
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name} must be positive and within the schedule's"):
            grids.uniform_log_snr(LINEAR, 10, **options)
    with pytest.raises(ValueError, match="sigma_max must be more than sigma_min"):
        grids.karras(LINEAR, 10, sigma_max=0.1, sigma_min=1.0)
    with pytest.raises(ValueError, match="rho must be positive"):
        grids.karras(LINEAR, 10, rho=0)
    with pytest.raises(ValueError, match="a and b must be positive"):
        grids.beta(LINEAR, 10, a=0)
    for sigmas in ([1.0, 2.0], [1.0, 0.0], [], 1.0):
        with pytest.raises(ValueError, match="sigmas must be a vector of positive values"):
            grids.from_sigmas(LINEAR, sigmas)
    with pytest.raises(ValueError, match="sigmas must be positive and within the schedule's"):
        grids.from_sigmas(LINEAR, [1e3, 1.0])
    with pytest.raises(ValueError, match="one sigma cannot be interpolated"):
        grids.from_sigmas(LINEAR, [1.0], 3)


def test_a_traced_schedule_is_refused_with_the_cure():
    for make in (grids.trailing, grids.karras):
        with pytest.raises(ValueError, match="close over the schedule"):
            jax.jit(lambda s, make=make: make(s, 5))(schedules.linear(10))
    learned = schedules.init_learned(jax.random.key(0), width=4)
    with pytest.raises(ValueError, match="close over the schedule"):
        jax.jit(lambda p: grids.trailing(schedules.learned(p), 5))(learned)
    # Made inside a compiled function, a grid is still made of constants.
    made = lambda: grids.churn(LINEAR, grids.karras(LINEAR, 5), 1.0)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(lambda: made().sigma)(), made().sigma)
    assert jax.jit(lambda: grids.trailing(schedules.linear(10), 5).t)().shape == (6,)
    with pytest.raises(ValueError, match="a grid is changed on the host"):
        jax.jit(lambda g: grids.resample(g, 2, 2))(grids.trailing(LINEAR, 5))


@pytest.mark.parametrize("s_churn", [2.0, 40.0])
def test_churn_is_algorithm_2(s_churn):
    num_steps, s_min, s_max, schedule = 18, 0.05, 50.0, schedules.edm()

    def make():
        grid = grids.karras(schedule, num_steps)
        return grid, grids.churn(schedule, grid, s_churn, s_min=s_min, s_max=s_max)

    grid, churned = in_float64(make)
    expected = []
    for sigma in grid.sigma[:-1]:
        gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0
        expected += [sigma] + [sigma * (1 + gamma)] * (gamma > 0)
    np.testing.assert_allclose(churned.sigma, [*expected, 0], rtol=1e-12)
    np.testing.assert_array_equal(churned.alpha, 1)
    for t, sigma in zip(churned.t, churned.sigma, strict=True):
        assert sigma == 0 or abs(schedule.time(-2 * math.log(sigma)) - t) < 1e-6


def test_churn_stays_on_the_schedules_process_and_keeps_the_nodes():
    def make():
        grid = grids.trailing(LINEAR, 10)
        return grid, grids.churn(LINEAR, grid, 2.0)

    grid, churned = in_float64(make)
    assert churned.t.shape == (21,)
    for name in ("t", "alpha", "sigma"):
        np.testing.assert_array_equal(getattr(churned[::2], name), getattr(grid, name))
    np.testing.assert_allclose(ratios(churned)[1::2], 1.2 * ratios(grid)[:-1], rtol=1e-12)
    np.testing.assert_allclose((churned.alpha**2 + churned.sigma**2)[1::2], 1, rtol=1e-12)
    # The first node, too, goes up; t is held at the last index.
    assert churned.t[1] == 999
    same = grids.churn(LINEAR, grids.trailing(LINEAR, 10), 0.0)
    assert same.t.dtype == jnp.int32
    np.testing.assert_array_equal(same.alpha, grids.trailing(LINEAR, 10).alpha)
    # From no signal one cannot go up.
    assert grids.churn(ZERO_SNR, grids.trailing(ZERO_SNR, 10), 2.0).t.shape == (20,)


def test_restart_goes_up_at_the_nearest_node():
    schedule = schedules.edm()

    def make():
        grid = grids.karras(schedule, 10)
        return grid, grids.restart(schedule, grid, [(2, 3, 0.5, 5.0), (1, 1, 0.01, 0.1)])

    grid, longer = in_float64(make)
    near = [int(np.argmin(np.abs(np.log(grid.sigma[:-1] / low)))) for low in (0.5, 0.01)]
    expected = []
    for i, sigma in enumerate(grid.sigma):
        expected.append(sigma)
        if i == near[0]:
            way = np.linspace(5 ** (1 / 7), sigma ** (1 / 7), 4) ** 7
            expected += [*way[:-1], sigma] * 2
        if i == near[1]:
            expected += [0.1, sigma]
    np.testing.assert_allclose(longer.sigma, expected, rtol=1e-10)


def repaint(num_nodes, jump_length, num_resamples):
    """Lugmayr et al. 2022, appendix B: node numbers from the data, -1 for clean, ups one by one."""
    jumps = {j: num_resamples - 1 for j in range(0, num_nodes - jump_length, jump_length)}
    t, walk = num_nodes, []
    while t >= 1:
        t -= 1
        walk.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                walk.append(t)
    return [*walk, -1]


@given(data=st.data())
def test_resample_is_the_papers_walk_with_each_climb_in_one_move(data):
    num_nodes = data.draw(st.integers(2, 40))
    jump_length = data.draw(st.integers(1, num_nodes - 1))
    num_resamples = data.draw(st.integers(1, 4))
    walk = np.array(repaint(num_nodes, jump_length, num_resamples))
    inside = (walk[1:-1] > walk[:-2]) & (walk[2:] > walk[1:-1])  # of a climb
    walk = np.concatenate([walk[:1], walk[1:-1][~inside], walk[-1:]])
    grid = grids.trailing(schedules.linear(40), num_nodes)
    longer = grids.resample(grid, jump_length, num_resamples)
    np.testing.assert_array_equal(longer.t, np.asarray(grid.t)[num_nodes - 1 - walk])
    assert longer.t.dtype == jnp.int32
    ending = grids.resample(grid[:-1], jump_length, num_resamples)
    np.testing.assert_array_equal(ending.t, longer.t[:-1])


@pytest.mark.parametrize("stages", [2, 3])
def test_midpoints_divide_the_log_snr_but_not_the_arrival(stages):
    def make():
        grid = grids.trailing(LINEAR, 5)
        return grid, grids.with_midpoints(LINEAR, grid, stages)

    grid, divided = in_float64(make)
    assert divided.t.shape == (4 * stages + 2,)
    np.testing.assert_array_equal(divided.t[:-1:stages], grid.t[:-1])
    log_snr = -2 * np.log(ratios(divided)[:-1])
    steps = np.diff(log_snr).reshape(4, stages)
    np.testing.assert_allclose(steps, steps[:, :1] * np.ones(stages), rtol=1e-9)
    # Moves up stay whole.
    up = grids.resample(grids.trailing(LINEAR, 5), 2, 2)
    goes_down = (np.diff(up.t) < 0) & (up.t[1:] >= 0)
    divided = grids.with_midpoints(LINEAR, up, stages)
    assert divided.t.size == up.t.size + (stages - 1) * int(goes_down.sum())
    assert int(np.sum(np.diff(ratios(divided)) > 0)) == int(np.sum(np.diff(up.t) > 0))


def test_halves_are_at_the_middle_times():
    grid = grids.trailing(LINEAR, 4)
    assert grids.with_halves(LINEAR, grid).t.tolist() == [999, 874, 749, 624, 499, 374, 249, -1]
    halves = grids.with_halves(LINEAR, grids.trailing(LINEAR, 1000), 1)
    assert halves.t[:3].tolist() == [999, 998.5, 998]
    flow = schedules.rectified_flow()
    halves = grids.with_halves(flow, grids.trailing(flow, 4), 2)
    np.testing.assert_allclose(halves.sigma, [1, 0.875, 0.75, 0.625, 0.5, 0.25, 0])


def test_bad_derived_grids_are_refused():
    grid = grids.trailing(LINEAR, 10)
    up = grids.resample(grid, 5, 2)
    with pytest.raises(ValueError, match="s_churn must be finite and not negative"):
        grids.churn(LINEAR, grid, -1.0)
    with pytest.raises(ValueError, match="s_min must not be more than s_max"):
        grids.churn(LINEAR, grid, 1.0, s_min=2.0, s_max=1.0)
    with pytest.raises(ValueError, match=r"a grid needs fields \(N\+1,\)"):
        grids.churn(LINEAR, grid[0], 1.0)
    for interval, match in (
        ((1, 2, 0.1), "each interval must be"),
        ((0, 2, 0.1, 1.0), "num_restarts must be a positive integer"),
        ((1, 0, 0.1, 1.0), "num_steps must be a positive integer"),
        ((1, 2, 0.1, 1e4), "sigma_high must be positive and within"),
        ((1, 2, 1.0, 0.5), "sigma_high must lie above the grid's node"),
    ):
        with pytest.raises(ValueError, match=match):
            grids.restart(LINEAR, grid, [interval])
    for make in (lambda g: grids.restart(LINEAR, g, []), lambda g: grids.resample(g, 2, 2)):
        with pytest.raises(ValueError, match="a grid that only goes down"):
            make(up)
    for jump_length in (0, 10, 2.5):
        with pytest.raises(ValueError, match=r"jump_length must be an integer from 1 to .* 9"):
            grids.resample(grid, jump_length, 2)
    with pytest.raises(ValueError, match="num_resamples must be a positive integer"):
        grids.resample(grid, 2, 0)
    with pytest.raises(ValueError, match="stages must be at least 2"):
        grids.with_midpoints(LINEAR, grid, 1)
    with pytest.raises(ValueError, match="the first step starts from zero signal"):
        grids.with_midpoints(ZERO_SNR, grids.trailing(ZERO_SNR, 10), 2)
    for first in (0, 10):
        with pytest.raises(ValueError, match=r"first must be an integer from 1 to .* 9"):
            grids.with_halves(LINEAR, grid, first)


def climbing():
    grid = grids.trailing(LINEAR, 12)
    return {
        "churn": grids.churn(LINEAR, grid, 3.0, s_max=5.0),
        "restart": grids.restart(LINEAR, grid, [(2, 3, 0.3, 3.0)]),
        "resample": grids.resample(grid, 3, 2),
    }


@pytest.mark.parametrize("name", ["churn", "restart", "resample"])
def test_a_sampler_keeps_the_moments_on_grids_that_go_up(name):
    # Gaussian data: each move is affine, so mean and variance have a recursion in float64.
    mean, std, num, grid = 0.6, 0.4, 8000, climbing()[name]
    exact = denoisers.gaussian([mean], [std])
    keys = rng.per_example(jax.random.key(0), jnp.arange(num))
    x, record = jax.jit(
        lambda x: sampling.walk(keys, exact.denoiser, solvers.ddim(), grid, x)
    )(grid.sigma[0] * rng.normal(rng.stream(keys, rng.Stream.START), (1,)))  # fmt: skip
    m, v, downs = 0.0, float(grid.sigma[0]) ** 2, 0
    nodes = zip(np.float64(grid.alpha), np.float64(grid.sigma), strict=True)
    for (a, s), (b, z) in itertools.pairwise(nodes):
        if z * a > s * b:
            m, v = b / a * m, (b / a) ** 2 * v + z**2 - (b / a * s) ** 2
            continue
        gain = a * std**2 / ((a * std) ** 2 + s**2)
        slope, downs = z / s + (b - z / s * a) * gain, downs + 1
        m, v = slope * m + (b - z / s * a) * mean * (1 - gain * a), slope**2 * v
    assert int(record.evaluations) == downs < grid.t.size - 1
    bound = stats.norm.isf(1e-6 / 4)  # false alarm 1e-6
    x = np.float64(x)
    assert abs(x.mean() - m) < bound * np.sqrt(v / num)
    assert abs(x.var() / v - 1) < bound * np.sqrt(2 / num)


def test_floats_are_float64_where_that_is_enabled():
    for make in (lambda: grids.trailing(LINEAR, 5), lambda: grids.karras(schedules.edm(), 5)):
        assert {f.dtype for f in (make().alpha, make().sigma)} == {jnp.dtype("float32")}
        wide = in_float64(make)
        assert {wide.alpha.dtype, wide.sigma.dtype} == {np.dtype("float64")}
        np.testing.assert_array_equal(np.float32(wide.sigma), make().sigma)
    assert in_float64(lambda: grids.trailing(LINEAR, 5)).t.dtype == np.int32


def test_a_grid_is_indexed_and_not_iterated():
    with pytest.raises(TypeError, match="not iterable"):
        iter(grids.trailing(LINEAR, 3))
