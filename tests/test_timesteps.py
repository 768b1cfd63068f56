"""Samplers of the diffusion time: their laws, addresses, and the loss-aware one's exactness.

Statistical tests reject at 1e-6 each.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from jaxdiff import schedules, timesteps

KEY = jax.random.key(0)
DISCRETE = schedules.linear(100)
FLOW = schedules.rectified_flow()
N = 64
SAMPLERS = {
    "uniform": timesteps.uniform,
    "stratified": timesteps.stratified(N),
    "low_discrepancy": timesteps.low_discrepancy(N),
    "logit_normal": timesteps.logit_normal(0.3, 1.2),
    "log_normal_sigma": timesteps.log_normal_sigma(),
}


def draw(sampler, schedule, size):
    return np.asarray(jax.jit(lambda key: sampler(key, jnp.arange(size), schedule))(KEY))


def number(index, stream=1):
    """The key of an example's times, written out: the step's key, the example, the stream."""
    return jax.random.fold_in(jax.random.fold_in(KEY, index), stream)


def test_uniform_and_stratified_draw_the_numbers_of_their_addresses():
    u = np.array([float(jax.random.uniform(number(i))) for i in range(8)], np.float32)
    index = jnp.arange(8)
    strata = (np.float32([0, 1, 2, 3] * 2) + u) / np.float32(4)
    for sampler, expected in (
        (timesteps.uniform, u),
        (timesteps.stratified(4), strata),
    ):
        np.testing.assert_array_equal(
            sampler(KEY, index, DISCRETE), (expected * np.float32(100)).astype(int)
        )
        np.testing.assert_array_equal(sampler(KEY, index, FLOW), expected)


@pytest.mark.parametrize("schedule", [DISCRETE, FLOW], ids=["discrete", "continuous"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_times_have_the_type_and_depend_on_key_and_index_alone(name, schedule):
    sample = jax.jit(lambda key, index: SAMPLERS[name](key, index, schedule))
    whole = sample(KEY, jnp.arange(N))
    parts = [sample(KEY, jnp.arange(i, i + 16)) for i in range(0, N, 16)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole != sample(jax.random.key(1), jnp.arange(N))).any()
    if schedule is FLOW:
        assert whole.dtype == jnp.float32
        assert (whole > 0).all()
        assert (whole < 1).all()
    else:
        assert whole.dtype == jnp.int32
        assert (whole >= 0).all()
        assert (whole < 100).all()
    with jax.enable_x64(True):  # types do not follow the default
        again = jax.eval_shape(sample, KEY, jnp.arange(N))
        assert again.dtype == whole.dtype


@pytest.mark.parametrize("name", ["uniform", "stratified", "low_discrepancy"])
def test_times_are_uniform_over_the_run(name):
    keys = jax.random.split(jax.random.key(7), 500)
    t = jax.jit(jax.vmap(lambda key: SAMPLERS[name](key, jnp.arange(N), schedules.linear(40))))
    counts = np.bincount(np.asarray(t(keys)).ravel(), minlength=40)
    assert len(counts) == 40
    # Evenly spread counts vary less than independent ones, which the upper tail allows.
    assert stats.chisquare(counts).pvalue > 1e-6
    u = jax.jit(jax.vmap(lambda key: SAMPLERS[name](key, jnp.arange(N), FLOW)))(keys)
    if name == "low_discrepancy":  # uniform at each position on its own
        assert min(stats.kstest(row, "uniform").pvalue for row in np.asarray(u).T) > 1e-6 / N
    else:
        assert stats.kstest(np.asarray(u).ravel(), "uniform").pvalue > 1e-6


def test_stratified_and_low_discrepancy_times_fill_every_stratum():
    for sampler in (timesteps.stratified(50), timesteps.low_discrepancy(50)):
        t = np.sort(draw(sampler, schedules.linear(1000), 50))
        np.testing.assert_array_equal(t // 20, np.arange(50))
    u = np.sort(draw(timesteps.low_discrepancy(50), FLOW, 50))
    np.testing.assert_allclose(np.diff(u), 1 / 50, atol=2e-7)
    assert np.diff(np.sort(draw(timesteps.stratified(50), FLOW, 50))).std() > 1e-3


def test_logit_normal_times_have_their_law():
    sampler = timesteps.logit_normal(-0.5, 0.7)
    t = draw(sampler, FLOW, 20_000).astype(np.float64)
    assert stats.kstest((special.logit(t) + 0.5) / 0.7, "norm").pvalue > 1e-6
    edges = stats.norm.cdf((special.logit(np.arange(11) / 10) + 0.5) / 0.7)
    counts = np.bincount(draw(sampler, schedules.linear(10), 20_000), minlength=10)
    assert stats.chisquare(counts, 20_000 * np.diff(edges)).pvalue > 1e-6


def test_log_normal_sigma_times_have_their_law():
    sampler = timesteps.log_normal_sigma(-0.4, 1.1)
    t = draw(sampler, FLOW, 20_000).astype(np.float64)
    assert stats.kstest((np.log(t / (1 - t)) + 0.4) / 1.1, "norm").pvalue > 1e-6
    # The nearest index: it changes half-way between the levels of two.
    schedule = schedules.linear(12, 0.02, 0.6)
    level = -np.asarray(schedule.nodes.log_snr, np.float64) / 2
    edges = np.concatenate([[-np.inf], (level[1:] + level[:-1]) / 2, [np.inf]])
    expected = 20_000 * np.diff(stats.norm.cdf((edges + 0.4) / 1.1))
    assert expected.min() > 5
    counts = np.bincount(draw(sampler, schedule, 20_000), minlength=12)
    assert stats.chisquare(counts, expected).pvalue > 1e-6


def test_times_stay_off_both_ends():
    # Where float32 would round to 0 or 1.
    last = timesteps.stratified(2**24)(KEY, 2**24 - 1 + jnp.zeros(4, jnp.int32), FLOW)
    low, high = (timesteps.logit_normal(mean)(KEY, jnp.arange(4), FLOW) for mean in (-200, 200))
    np.testing.assert_array_equal(low, 2**-24)
    np.testing.assert_array_equal(last, np.float32(1 - 2**-24))
    np.testing.assert_array_equal(high, last)
    node = FLOW.at(jnp.concatenate([low, high]))
    assert np.isfinite(node.log_snr).all()
    for mean, end in ((-200, 0), (200, 99)):
        t = timesteps.log_normal_sigma(mean)(KEY, jnp.arange(4), DISCRETE)
        np.testing.assert_array_equal(t, end)


def fill(sampler, losses):
    """A full history with these losses at each t, `(T,)` or `(T, num_terms)`."""
    history = sampler.init(len(losses))
    rows, terms = history.losses.shape
    losses = np.broadcast_to(np.reshape(losses, (rows, -1)), (rows, terms))
    return jax.jit(sampler.update)(
        history, jnp.repeat(jnp.arange(rows), terms), jnp.asarray(losses.ravel())
    )


STEPS, TERMS, PAIRS = 5, 3, 12
SMALL = timesteps.loss_aware(TERMS)
update = jax.jit(SMALL.update)
pairs = st.lists(
    st.tuples(
        st.integers(-1, STEPS),
        st.one_of(
            st.floats(-10, 10, width=32), st.sampled_from([float("nan"), float("inf"), -np.inf])
        ),
    ),
    min_size=PAIRS, max_size=PAIRS,
)  # fmt: skip


@given(pairs, pairs)
def test_the_history_holds_the_last_losses_in_order(first, second):
    rows = [collections.deque(maxlen=TERMS) for _ in range(STEPS)]
    history = SMALL.init(schedules.linear(STEPS))
    for part in (first, second):
        t, loss = zip(*part, strict=True)
        history = update(history, jnp.array(t, jnp.int32), jnp.array(loss, jnp.float32))
        for index, value in part:
            if 0 <= index < STEPS and np.isfinite(value):
                rows[index].append(value)
        np.testing.assert_array_equal(history.counts, [len(row) for row in rows])
        expected = [list(row) + [0.0] * (TERMS - len(row)) for row in rows]
        np.testing.assert_array_equal(history.losses, np.array(expected, np.float32))
    assert history.losses.dtype == jnp.float32
    assert history.counts.dtype == jnp.int32


def test_until_the_history_is_full_times_are_uniform():
    sampler, index = timesteps.loss_aware(2), jnp.arange(64)
    t = jnp.repeat(jnp.arange(8), 2)
    almost = jax.jit(sampler.update)(sampler.init(8), t[:-1], t[:-1] ** 2.0)
    schedule, sample = schedules.linear(8), jax.jit(sampler.sample)
    for history in (sampler.init(8), almost):
        drawn, weight = sample(KEY, index, schedule, history)
        np.testing.assert_array_equal(drawn, timesteps.uniform(KEY, index, schedule))
        np.testing.assert_array_equal(weight, 1)
        assert (drawn.dtype, weight.dtype) == (jnp.int32, jnp.float32)
    full = jax.jit(sampler.update)(almost, t[-1:], t[-1:] ** 2.0)
    assert (sample(KEY, index, schedule, full)[1] != 1).all()


LOSSES = np.array([[3, 1], [0.5, 0.5], [1, 2], [0.01, 0], [9, 4], [1, 1], [-2, 1]], np.float64)


@pytest.mark.parametrize("c", [0.001, 0.3])
def test_times_are_drawn_by_the_root_of_the_mean_square_and_weighted_back(c):
    steps, size = len(LOSSES), 100_000
    sampler, schedule = timesteps.loss_aware(2, c), schedules.linear(steps)
    history = fill(sampler, LOSSES)
    root = np.sqrt((LOSSES**2).mean(axis=1))
    p = (1 - c) * root / root.sum() + c / steps
    sample = jax.jit(sampler.sample)
    t, weight = sample(KEY, jnp.arange(size), schedule, history)
    t, weight = np.asarray(t), np.asarray(weight, np.float64)
    assert stats.chisquare(np.bincount(t, minlength=steps), size * p).pvalue > 1e-6
    np.testing.assert_allclose(weight, 1 / (steps * p[t]), rtol=2e-3)
    f = np.array([1.0, -2, 4, 3, 0.5, 8, 5])  # any function of t, not the losses
    values = weight * f[t]
    error = values.std() / size**0.5
    assert abs(values.mean() - f.mean()) < stats.norm.isf(0.5e-6) * error
    # A draw depends on its own address only.
    again, _ = sample(KEY, jnp.arange(40, 60), schedule, history)
    np.testing.assert_array_equal(again, t[40:60])


@pytest.mark.parametrize("c", [0.0, 0.001])
def test_weights_are_exact_where_probabilities_are_below_rounding(c):
    # One t out of 1000 takes nearly all. The rest must weigh what they are drawn.
    sampler, schedule = timesteps.loss_aware(1, c), schedules.linear(1000)
    sample = jax.jit(sampler.sample)
    for losses in (np.where(np.arange(1000) == 500, 1e30, 1e-30), np.zeros(1000), np.ones(1000)):
        history = fill(sampler, losses)
        _, weight = sample(KEY, jnp.arange(4), schedule, history)
        assert np.isfinite(weight).all()
        if losses[0] == losses[1] == losses[500]:
            np.testing.assert_allclose(weight, 1, rtol=1e-3)
        probability = np.asarray(timesteps._cells(timesteps._probabilities(history.losses, c)))
        assert probability.sum() == 2**23
        assert probability.min() >= 1
        assert probability.min() >= (1 - 1e-3) * c / 1000 * 2**23  # weights at most 1 / c


def gaussian_losses(key, t, schedule):
    """Losses of the best network for 1-d data N(0, 1/4): |x0 - E[x0 | x]|² times the SNR."""
    node, variance = schedule.at(t), 0.25
    noise = jax.random.normal(key, (2, *t.shape))
    x0 = variance**0.5 * noise[0]
    x = node.alpha * x0 + node.sigma * noise[1]
    best = node.alpha * variance * x / (node.alpha**2 * variance + node.sigma**2)
    return (x0 - best) ** 2 * (node.alpha / node.sigma) ** 2


def test_the_estimate_of_the_loss_varies_less_than_with_uniform_times():
    sampler, schedule, size = timesteps.loss_aware(10), schedules.linear(50, 1e-3, 0.3), 512
    keys = jax.random.split(jax.random.key(7), 400)

    def step(history, key):
        t, weight = sampler.sample(key, jnp.arange(size), schedule, history)
        loss = gaussian_losses(jax.random.fold_in(key, 10**6), t, schedule)
        return sampler.update(history, t, loss), (weight, loss)

    _, (weight, loss) = jax.jit(lambda keys: jax.lax.scan(step, sampler.init(schedule), keys))(keys)
    full = np.asarray((weight != 1).all(axis=1))
    assert full[50:].all()
    assert not full[0]
    aware = np.asarray(weight * loss, np.float64)[50:]
    t = jax.random.randint(jax.random.key(2), aware.shape, 0, 50)
    plain = np.asarray(gaussian_losses(jax.random.key(3), t, schedule), np.float64)
    # The truth in closed form: the mean over t of SNR times the posterior variance.
    snr = np.exp(np.asarray(schedule.nodes.log_snr, np.float64))
    truth = (snr / (4 + snr)).mean()
    for values in (aware, plain):
        error = values.mean(axis=1).std() / len(values) ** 0.5
        assert abs(values.mean() - truth) < stats.norm.isf(0.5e-6) * error
    assert aware.var() < 0.5 * plain.var()


def test_losses_that_are_not_finite_do_no_harm():
    history = fill(SMALL, np.arange(1.0, 6.0))
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.nan])
    after = update(history, jnp.array([0, 1, 2, 2]), bad)
    jax.tree.map(np.testing.assert_array_equal, after, history)
    # Nor those whose squares would not be finite in float32.
    huge = fill(SMALL, np.full(5, 3e38))
    _, weight = jax.jit(SMALL.sample)(KEY, jnp.arange(8), schedules.linear(5), huge)
    np.testing.assert_allclose(weight, 1, rtol=1e-4)


def test_bad_arguments_are_refused():
    for make in (timesteps.stratified, timesteps.low_discrepancy, timesteps.loss_aware):
        with pytest.raises(ValueError, match=r"num_\w+ must be at least 1, got 0"):
            make(0)
    for make in (timesteps.logit_normal, timesteps.log_normal_sigma):
        with pytest.raises(ValueError, match="std must be positive, got -1"):
            make(0.0, -1.0)
    for c in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"uniform_probability must lie in \[0, 1\]"):
            timesteps.loss_aware(uniform_probability=c)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        SMALL.init(0)
    with pytest.raises(ValueError, match="needs a discrete schedule"):
        SMALL.init(FLOW)
    history = SMALL.init(STEPS)
    with pytest.raises(ValueError, match="needs a discrete schedule"):
        SMALL.sample(KEY, jnp.arange(2), FLOW, history)
    with pytest.raises(ValueError, match=r"shape \(100, 3\), got \(5, 3\): make it with"):
        SMALL.sample(KEY, jnp.arange(2), DISCRETE, history)
    with pytest.raises(ValueError, match="t and loss must have the same shape"):
        SMALL.update(history, jnp.arange(3), jnp.ones(2))
    with pytest.raises(TypeError, match="typed key"):
        timesteps.low_discrepancy(2)(jax.random.PRNGKey(0), jnp.arange(2), DISCRETE)
