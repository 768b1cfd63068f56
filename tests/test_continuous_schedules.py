"""Continuous schedules against the papers' formulas in 50 digits, and their general promises."""

import functools
import re
from decimal import Decimal, getcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff import schedules

getcontext().prec = 50
D = Decimal
PI = D("3.14159265358979323846264338327950288419716939937510582097494")


def sin(x):
    term, total, n = x, x, 1
    while abs(term) > D("1e-55"):
        term *= -x * x / ((n + 1) * (n + 2))
        total, n = total + term, n + 2
    return total


def cos(x):
    return sin(PI / 2 - x)


def logistic(x):
    return 1 / (1 + (-x).exp())


def variance_preserving(alpha_bar):
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def of_log_snr(log_snr):
    return logistic(log_snr).sqrt(), logistic(-log_snr).sqrt()


def beta_integral(t):
    return D(0.1) * t + (D(20) - D(0.1)) * t * t / 2


def exact_sub_vp(t):
    return (-beta_integral(t) / 2).exp(), 1 - (-beta_integral(t)).exp()


def exact_cosine(t, s):
    angle, start = ((t + s) / (1 + s) * PI / 2), (s / (1 + s) * PI / 2)
    return variance_preserving((cos(angle) / cos(start)) ** 2)


def exact_sigmoid(t, start, end, tau):
    low, high = logistic(start / tau), logistic(end / tau)
    now = logistic((t * (end - start) + start) / tau)
    return variance_preserving((high - now) / (high - low))


def exact_laplace(t, mean, scale):
    if t in (0, 1):
        return 1 - t, t
    sign = 1 if t < D("0.5") else -1
    return of_log_snr(mean - scale * sign * (1 - 2 * abs(t - D("0.5"))).ln())


def exact_edm(t):
    low, high, rho = D(0.002), D(80), D(7)
    return D(1), (low ** (1 / rho) + t * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def exact_shifted_flow(t):
    return (1 - t) / (1 + 2 * t), 3 * t / (1 + 2 * t)


@functools.cache
def linear_alphas_bar():
    products = [D(1)]
    for beta in np.asarray(schedules.linear(100, 1e-3, 0.2).betas, np.float64):
        products.append(products[-1] * (1 - D(float(beta))))
    return products


def exact_interpolated(t):
    step = min(int(t * 100), 99)
    before, after = linear_alphas_bar()[step : step + 2]
    return variance_preserving(before * ((after / before).ln() * (t * 100 - step)).exp())


# name: (schedule, the paper's formula t -> (alpha, sigma) if it has one)
ALL = {
    "vp_linear": (schedules.vp_linear(), lambda t: variance_preserving((-beta_integral(t)).exp())),
    "sub_vp": (schedules.sub_vp(), exact_sub_vp),
    "vp_cosine": (schedules.vp_cosine(), lambda t: exact_cosine(t, D(0))),
    "vp_cosine offset": (schedules.vp_cosine(0.008), lambda t: exact_cosine(t, D(0.008))),
    "vp_sigmoid": (schedules.vp_sigmoid(), lambda t: exact_sigmoid(t, D(-3), D(3), D(1))),
    "vp_sigmoid steep": (
        schedules.vp_sigmoid(-5, 2, 0.25), lambda t: exact_sigmoid(t, D(-5), D(2), D(0.25))
    ),
    "laplace": (schedules.laplace(), lambda t: exact_laplace(t, D(0), D(0.5))),
    "laplace moved": (
        schedules.laplace(-1.0, 2.0), lambda t: exact_laplace(t, D(-1), D(2))
    ),
    "ve": (schedules.ve(), lambda t: (D(1), D(0.01) * (D(50) / D(0.01)) ** t)),
    "edm": (schedules.edm(), exact_edm),
    "rectified_flow": (schedules.rectified_flow(), lambda t: (1 - t, t)),
    "shifted": (schedules.shifted(schedules.rectified_flow(), 3.0), exact_shifted_flow),
    "truncated": (schedules.truncated(schedules.vp_cosine()), None),
    "truncated ve": (schedules.truncated(schedules.ve(), -6.0, 30.0), None),
    "interpolated": (
        schedules.interpolated(schedules.linear(100, 1e-3, 0.2)), exact_interpolated
    ),
    "interpolated to zero": (
        schedules.interpolated(schedules.zero_terminal_snr(schedules.linear(100))), None
    ),
    "learned": (schedules.learned(schedules.init_learned(jax.random.key(0), 16)), None),
}  # fmt: skip
FORMULAS = {name: pair for name, pair in ALL.items() if pair[1] is not None}
TIMES = [0, 1e-8, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.25, 0.4999, 0.5, 0.5001, 0.7, 0.9, 0.99, 0.999,
         1 - 1e-6, 1]  # fmt: skip


@pytest.fixture(params=ALL)
def schedule(request):
    return ALL[request.param][0]


@functools.cache
def compiled(schedule):
    def everything(t):
        log_snr = schedule.log_snr(t)
        return schedule.at(t), log_snr, schedule.time(log_snr)

    return jax.jit(everything)


def evaluate(schedule, times, dtype=np.float32):
    """Returns node, log-SNR and the times back from it; one program for all numbers of times."""
    padded = np.full(1024, 0.5, dtype)
    padded[: len(times)] = times
    with jax.enable_x64(dtype == np.float64):
        out = compiled(schedule)(jnp.asarray(padded))
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(dtype)}
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(times)], out)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 3e-6), (np.float64, 1e-13)])
def test_formulas_hold_in_fifty_digits_at_both_ends(name, dtype, rtol):
    # The largest errors are those of exp at a log-SNR of 40, rounded to half a unit: 2e-6.
    schedule, formula = FORMULAS[name]
    times = np.asarray(TIMES, dtype)
    alpha, sigma = zip(*(formula(D(float(t))) for t in times), strict=True)
    node, log_snr, _ = evaluate(schedule, times, dtype)
    np.testing.assert_allclose(node.alpha, np.array(alpha, np.float64), rtol=rtol)
    np.testing.assert_allclose(node.sigma, np.array(sigma, np.float64), rtol=rtol)
    inside = [i for i in range(len(TIMES)) if alpha[i] * sigma[i] != 0]
    exact = [float(2 * (alpha[i] / sigma[i]).ln()) for i in inside]
    np.testing.assert_allclose(log_snr[inside], exact, rtol=rtol, atol=rtol / 3)


def test_linear_vp_has_no_excess_of_noise_at_the_clean_end():
    # sqrt(1 - alpha²) in float32 is 9 % high there.
    got = float(schedules.vp_linear().at(1e-6).sigma)
    np.testing.assert_allclose(got, np.sqrt(1e-7), rtol=1e-4)


CLEAN = {
    "vp_linear", "sub_vp", "vp_cosine", "vp_cosine offset", "vp_sigmoid", "vp_sigmoid steep",
    "laplace", "laplace moved", "rectified_flow", "shifted", "interpolated", "interpolated to zero",
}  # fmt: skip
NO_SIGNAL = CLEAN - {"vp_linear", "sub_vp", "interpolated"}


@pytest.mark.parametrize("name", ALL)
def test_ends_are_exact_where_they_are_said_to_be(name):
    schedule = ALL[name][0]
    node, log_snr, back = evaluate(schedule, [0, 1])
    chex.assert_tree_all_finite(node)
    assert (node.sigma[0] == 0) == (log_snr[0] == np.inf) == (name in CLEAN)
    assert (node.alpha[1] == 0) == (log_snr[1] == -np.inf) == (name in NO_SIGNAL)
    assert schedule.ends_at_zero_snr == (name in NO_SIGNAL)
    assert schedule.num_steps is None
    np.testing.assert_allclose(back, [0, 1], atol=1e-6)


def test_families_and_a_falling_log_snr(schedule):
    node, log_snr, _ = evaluate(schedule, np.linspace(0, 1, 1001))
    alpha, sigma = node.alpha.astype(np.float64), node.sigma.astype(np.float64)
    relation = {
        schedules.variance_preserving: alpha**2 + sigma**2,
        schedules.sub_variance: alpha**2 + sigma,
        schedules.straight_line: alpha + sigma,
        schedules.variance_exploding: alpha,
    }[schedule.levels]
    np.testing.assert_allclose(relation, 1, rtol=5e-7)
    assert np.all(log_snr[:-1] > log_snr[1:])
    inside = np.isfinite(log_snr)
    ratio = 2 * np.log(alpha[inside] / sigma[inside])
    np.testing.assert_allclose(ratio, log_snr[inside], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("name", ALL)
def test_time_is_the_inverse_of_log_snr(name):
    schedule = ALL[name][0]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=100))
    def check(times):
        # float64; a log-SNR of 700 (t = 1e-300) is rounded by 1e-13.
        _, _, back = evaluate(schedule, times, np.float64)
        np.testing.assert_allclose(back, times, rtol=0, atol=2e-13)

    check()
    t = np.linspace(0, 1, 257)
    _, log_snr, back = evaluate(schedule, t)
    # float32: t is known as well as the log-SNR is, to 2 units in its last place.
    slope = np.abs(np.gradient(log_snr[1:-1], 1 / 256))
    atol = 3e-7 + 4 * np.spacing(np.abs(log_snr[1:-1])) / slope
    assert np.all(np.abs(back - t)[1:-1] <= atol)


@pytest.mark.parametrize("name", sorted(CLEAN))
def test_small_times_come_back_with_their_digits(name):
    # Where the log-SNR goes to infinity, t is known to a relative error.
    t = [1e-12, 1e-8, 1e-6, 1e-4, 0.01]
    np.testing.assert_allclose(evaluate(ALL[name][0], t)[2], t, rtol=1e-5)


def test_time_is_held_within_the_unit_interval(schedule):
    back = jax.jit(schedule.time)(jnp.array([-jnp.inf, -1e3, -40, 60, 1e3, jnp.inf]))
    assert np.all((back >= 0) & (back <= 1))
    np.testing.assert_allclose(back, [1, 1, 1, 0, 0, 0], atol=2e-6)
    np.testing.assert_array_equal(back[jnp.array([0, -1])], [1, 0])


@pytest.mark.parametrize("name", ["vp_linear", "edm", "interpolated", "learned", "truncated"])
def test_types_and_shapes(name):
    schedule = ALL[name][0]
    for t in (0.25, jnp.float32(0.25), jnp.full((3,), 0.25), jnp.full((3,), 0.25, jnp.bfloat16)):
        node = schedule.at(t)
        chex.assert_shape(jax.tree.leaves(node), jnp.shape(t))
        for leaf in jax.tree.leaves(node):
            assert leaf.dtype == jnp.float32
            assert not leaf.weak_type
    assert schedule.at(1).t == 1
    assert schedule.time(0).dtype == jnp.float32
    assert schedule.time(jnp.zeros((3,), jnp.bfloat16)).dtype == jnp.float32


def test_compiled_programs_know_no_times_outside_and_the_slope_inside(schedule):
    wrong = jax.jit(schedule.at)(jnp.array([-0.1, 0.5, 1.1, jnp.nan]))
    np.testing.assert_array_equal(np.isnan(wrong.sigma), [True, False, True, True])
    # The slope of the log-SNR, which the SDE and the variational bound need.
    t = np.array([1e-3, 0.303, 0.614, 0.999], np.float32)
    slope = jax.jit(jax.vmap(jax.grad(schedule.log_snr)))(t)
    (_, above, _), (_, below, _) = (
        evaluate(schedule, t.astype(np.float64) + change, np.float64) for change in (1e-7, -1e-7)
    )
    np.testing.assert_allclose(slope, (above - below) / 2e-7, rtol=2e-3)


def test_wrong_times_are_refused(schedule):
    for t in (-0.1, 1.5, 7, jnp.array([0.5, jnp.nan])):
        for ask in (schedule.at, schedule.log_snr):
            with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
                ask(t)
    with pytest.raises(TypeError, match=r"float in \[0, 1\].*int32.*\(i \+ 1\) / T"):
        schedule.at(jnp.array([0, 1]))
    with pytest.raises(TypeError, match="int32"):
        jax.jit(schedule.at)(jnp.array([0, 1]))


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_edm_visits_the_noise_levels_of_karras(rho):
    i, steps = np.arange(18), 18
    roots = 80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))
    node = schedules.edm(rho=rho).at(jnp.asarray(1 - i / (steps - 1), jnp.float32))
    np.testing.assert_allclose(node.sigma, roots**rho, rtol=3e-6)
    # Their released grid of 18 steps goes 80, 57.586, 40.786, 28.374, ...
    if rho == 7:
        np.testing.assert_allclose(node.sigma[:4], [80, 57.586, 40.786, 28.375], rtol=2e-5)


SHIFTS = {s: schedules.shifted(schedules.rectified_flow(), s) for s in (0.4, 3.0)}


@given(st.lists(st.floats(1e-300, 1), min_size=1, max_size=50))
def test_shift_of_the_flow_is_that_of_stable_diffusion_3(times):
    t = np.array(times)
    for factor, flow in SHIFTS.items():
        node, _, _ = evaluate(flow, times, np.float64)
        expected = factor * t / (1 + (factor - 1) * t)
        np.testing.assert_allclose(node.sigma, expected, rtol=1e-12)
        np.testing.assert_allclose(node.alpha, 1 - expected, rtol=1e-12, atol=1e-14)


def test_shift_is_that_of_simple_diffusion():
    # At 256 pixels the cosine schedule of 64 pixels: averaging 4 x 4 pixels restores its SNR.
    cosine = schedules.vp_cosine()
    moved = schedules.shifted(cosine, 256 / 64)
    t = jnp.linspace(0.01, 0.99, 9)
    node, before = moved.at(t), cosine.at(t)
    averaged = node.alpha**2 / (node.sigma**2 / 16)
    np.testing.assert_allclose(averaged, (before.alpha / before.sigma) ** 2, rtol=3e-6)
    assert moved.ends_at_zero_snr
    there_and_back = schedules.shifted(moved, 64 / 256)
    np.testing.assert_allclose(there_and_back.log_snr(t), cosine.log_snr(t), atol=2e-6)


@pytest.mark.parametrize("make", [schedules.vp_cosine, schedules.rectified_flow, schedules.laplace])
def test_truncated_ends_where_it_was_told_and_is_a_part_of_the_schedule(make):
    part = schedules.truncated(make(), -14.0, 12.0)
    assert not part.ends_at_zero_snr
    t = np.linspace(0, 1, 9)
    np.testing.assert_allclose(evaluate(part, [0, 1])[1], [12, -14], atol=1e-3)
    _, log_snr, _ = evaluate(part, t, np.float64)
    np.testing.assert_allclose(log_snr[[0, -1]], [12, -14], atol=1e-5)
    with jax.enable_x64(True):
        times = np.diff(jax.jit(make().time)(jnp.asarray(log_snr)))
    np.testing.assert_allclose(times, times.mean(), rtol=1e-9)  # a line
    if make is schedules.vp_cosine:
        # VDM++ and simple diffusion write the part as -2 log tan(a + b t).
        a, b = np.arctan(np.exp(-6.0)), np.arctan(np.exp(7.0))
        np.testing.assert_allclose(log_snr, -2 * np.log(np.tan(a + (b - a) * t)), atol=1e-9)


def test_an_end_that_lies_between_the_bounds_stays():
    node, _, _ = evaluate(ALL["truncated ve"][0], [0, 1])  # -6 .. 30
    np.testing.assert_allclose(node.sigma, [0.01, np.exp(3)], rtol=1e-5)


def test_discretized_approaches_the_discrete_linear_schedule():
    errors = []
    for num_steps in (500, 1000):
        ours = schedules.discretized(schedules.vp_linear(), num_steps)
        assert ours.num_steps == num_steps
        discrete = schedules.linear(num_steps, 0.1 / num_steps, 20 / num_steps)
        errors.append(float(jnp.abs(ours.betas - discrete.betas).max()) * num_steps)
    # In units of beta(t), of which the largest is 20, the error is of the order of 1 / T.
    assert errors[0] < 0.5
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.05)


def test_discretized_cosine_is_the_discrete_one_until_that_is_clipped():
    ours = schedules.discretized(schedules.vp_cosine(0.008), 500)
    discrete = schedules.cosine(500)
    kept = np.asarray(discrete.betas) < 0.999
    assert kept.sum() == 499
    np.testing.assert_allclose(ours.betas[kept], discrete.betas[kept], rtol=3e-7)
    np.testing.assert_allclose(ours.nodes.sigma[kept], discrete.nodes.sigma[kept], rtol=3e-7)
    assert ours.ends_at_zero_snr


@pytest.mark.parametrize("steps", [1, 1000])
@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
@pytest.mark.parametrize("to_zero", [False, True])
def test_steps_that_are_joined_and_cut_again_are_the_same(make, steps, to_zero):
    if to_zero and steps == 1:
        given_steps = schedules.from_alphas_bar([0.0])
    else:
        given_steps = schedules.zero_terminal_snr(make(steps)) if to_zero else make(steps)
    joined = schedules.interpolated(given_steps)
    again = schedules.discretized(joined, steps)
    chex.assert_trees_all_close(
        (again.betas, again.alphas_bar, again.nodes),
        (given_steps.betas, given_steps.alphas_bar, given_steps.nodes),
        rtol=3e-7,
    )
    assert again.ends_at_zero_snr == joined.ends_at_zero_snr == to_zero
    # In float32 too the nodes are met.
    node, _, _ = evaluate(joined, np.arange(1, steps + 1) / steps)
    np.testing.assert_allclose(node.sigma, given_steps.nodes.sigma, rtol=2e-5)
    np.testing.assert_allclose(node.alpha, given_steps.nodes.alpha, rtol=1e-3)


def test_joined_steps_have_a_constant_beta_in_each():
    discrete = schedules.linear(10, 0.01, 0.3)
    joined = schedules.interpolated(discrete)
    log_alpha_bar = jax.vmap(jax.grad(lambda t: 2 * jnp.log(joined.at(t).alpha)))
    for place in (0.2, 0.8):
        rate = -jax.jit(log_alpha_bar)((jnp.arange(10) + place) / 10)
        expected = -10 * np.log1p(-np.asarray(discrete.betas, np.float64))
        np.testing.assert_allclose(rate, expected, rtol=1e-4)


def test_the_last_step_to_zero_is_a_line():
    discrete = schedules.zero_terminal_snr(schedules.linear(10, 0.01, 0.3))
    joined = schedules.interpolated(discrete)
    alpha = evaluate(joined, np.linspace(0.9, 1, 11))[0].alpha
    expected = np.linspace(1, 0, 11) * float(discrete.nodes.alpha[8])
    np.testing.assert_allclose(alpha, expected, rtol=2e-5, atol=1e-7)


def test_your_own_schedule_takes_three_functions():
    own = schedules.ContinuousSchedule(
        "line", lambda t: 10 - 20 * t, lambda x: (10 - x) / 20, schedules.variance_preserving
    )
    np.testing.assert_allclose(own.at(0.5).alpha, np.sqrt(0.5), rtol=1e-6)
    assert own.time(1e9) == 0
    learned = ALL["learned"][0]._replace(levels=schedules.straight_line)
    np.testing.assert_allclose(learned.at(0.3).alpha + learned.at(0.3).sigma, 1, rtol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_learned_log_snr_falls_whatever_the_parameters(seed):
    params = schedules.init_learned(jax.random.key(seed), 16, -7.0, 9.0)
    assert schedules.init_learned(jax.random.key(seed)).rate.shape == (1024,)
    t = np.linspace(0, 1, 101)
    _, log_snr, _ = evaluate(schedules.learned(params), t)
    np.testing.assert_allclose(log_snr, 9 - 16 * t, atol=1)  # starts near the line
    np.testing.assert_allclose(log_snr[[0, -1]], [9, -7], rtol=1e-6)
    noise = jax.random.normal(jax.random.key(seed + 10), (2, 16))
    moved = params._replace(
        span=jnp.asarray(-2.0), height=8 * noise[0], rate=params.rate - 20, centre=3 * noise[1]
    )
    _, log_snr, back = evaluate(schedules.learned(moved), t)
    assert np.all(np.diff(log_snr) < 0)
    # Bisection knows t as well as the log-SNR, rounded, does.
    np.testing.assert_allclose(evaluate(schedules.learned(moved), back)[1], log_snr, atol=1e-4)


def test_gradients_reach_all_parameters_of_a_learned_schedule():
    params = schedules.init_learned(jax.random.key(0), 16)
    t = jax.random.uniform(jax.random.key(1), (32,))

    @jax.jit
    @jax.grad
    def gradient(params):
        node = schedules.learned(params).at(t)
        return jnp.mean(node.alpha) + jnp.mean(node.sigma**2)

    for leaf in gradient(params):
        assert np.all(np.isfinite(leaf))
        assert np.all(leaf != 0)
    # At the ends each end is a parameter of its own.
    both = jnp.array([0.0, 1.0])
    ends = jax.jit(jax.jacobian(lambda p: schedules.learned(p).log_snr(both)))(params)
    np.testing.assert_allclose(ends.log_snr_max, [1, 1])
    assert ends.span[0] == 0 > ends.span[1]
    np.testing.assert_allclose(ends.height, np.zeros((2, 16)), atol=1e-5)
    # The inverse is not a way to the parameters.
    back = jax.jit(jax.grad(lambda p: schedules.learned(p).time(1.0)))(params)
    chex.assert_trees_all_close(back, jax.tree.map(jnp.zeros_like, params))


def test_a_learned_schedule_learns():
    params = schedules.init_learned(jax.random.key(0), 16, -5.0, 5.0)
    t = jnp.linspace(0.02, 0.98, 64)
    target = schedules.vp_cosine().log_snr(t)

    def loss(params):
        return jnp.mean((schedules.learned(params).log_snr(t) - target) ** 2)

    adam = optax.adam(0.03)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = adam.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    _, values = jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), length=300))(params)
    assert values[-1] < values[0] / 10


VE = schedules.ve()
FLOW = schedules.rectified_flow()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: schedules.vp_linear(0.0), "0 < beta_min <= beta_max, got 0.0 and 20.0"),
        (lambda: schedules.sub_vp(3, 2), "beta_min <= beta_max, got 3 and 2"),
        (lambda: schedules.vp_cosine(-0.1), "s must be finite and not negative, got -0.1"),
        (lambda: schedules.vp_sigmoid(3, -3), "start < end and tau > 0, got 3, -3 and 1.0"),
        (lambda: schedules.vp_sigmoid(tau=0), "start < end and tau > 0"),
        (lambda: schedules.laplace(scale=0), "scale must be positive and mean finite, got 0"),
        (lambda: schedules.ve(2, 1), "0 < sigma_min < sigma_max, got 2 and 1"),
        (lambda: schedules.edm(0.0), "0 < sigma_min < sigma_max, got 0.0"),
        (lambda: schedules.edm(rho=-1), "rho must be positive, got -1"),
        (lambda: schedules.shifted(FLOW, 0), "factor must be positive, got 0"),
        (lambda: schedules.truncated(FLOW, 5, -5), "log_snr_min must be less than log_snr_max"),
        (lambda: schedules.truncated(FLOW, -np.inf, 5), "both finite, got -inf"),
        (lambda: schedules.truncated(VE, 20, 30), r"ve\(0.01, 50.0\) has no log-SNR .* from 9.2"),
        (lambda: schedules.discretized(VE, 10), r"got ve\(0.01, 50.0\) with 1.0² \+ .*_replace"),
        (lambda: schedules.discretized(FLOW, 10), "rectified_flow.* with 0.0² .* 1.0² at t = 1"),
        (lambda: schedules.discretized(schedules.sub_vp(), 10), "keep it continuous"),
        (lambda: schedules.discretized(schedules.vp_cosine(), 0), "num_steps must be a positive"),
        (lambda: schedules.init_learned(jax.random.key(0), 0), "width must be at least 1, got 0"),
        (lambda: schedules.init_learned(jax.random.key(0), 4, 1, 0), "less than log_snr_max"),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_values_must_be_known_where_the_host_computes():
    discrete = schedules.linear(10)
    for change in (schedules.interpolated, schedules.zero_terminal_snr):
        with pytest.raises(ValueError, match="outside of jit"):
            jax.jit(lambda s: jnp.sum(change(s).at(0).alpha))(discrete)  # noqa: B023
    params = schedules.init_learned(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda p: schedules.discretized(schedules.learned(p), 10))(params)
    # Made inside of a compiled function they work, as long as what they are made of is known.
    assert jax.jit(lambda: schedules.discretized(schedules.vp_cosine(), 4).betas)().shape == (4,)
    assert jax.jit(lambda: schedules.interpolated(schedules.linear(4)).at(0.5).alpha)() > 0
    assert schedules.discretized(schedules.learned(params), 10).num_steps == 10
    name = schedules.shifted(schedules.truncated(VE, -5, 5), 2.0).name
    assert re.fullmatch(r"shifted\(truncated\(ve\(0.01, 50.0\), -5, 5\), 2.0\)", name)
