"""Guidance against exact denoisers, whose guided versions are known, and counted calls."""

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff import denoisers, grids, guidance, rng, sampling, schedules, solvers
from jaxdiff.base import Node, Prediction
from jaxdiff.guidance import rules
from jaxdiff.predictions import eps_from_x0

SCHEDULE = schedules.linear()
GRID = grids.trailing(SCHEDULE, 10)
CLEAN = Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))
NO_SIGNAL = Node(jnp.int32(999), jnp.float32(0), jnp.float32(1))
SHAPE = (3, 4, 4, 1)
# One component of the mixture is what the condition chooses.
MEANS, STDS = np.stack([np.full(SHAPE[1:], -0.6), np.full(SHAPE[1:], 0.5)]), np.array([0.3, 0.2])
MEANS[1, 0] = 1.0
X = jax.random.normal(jax.random.key(0), SHAPE)


def pair():
    """The exact conditional and unconditional distribution, of the precision now enabled."""
    conditional = denoisers.gaussian(MEANS[1], STDS[1])
    return conditional, denoisers.gaussian_mixture([0.6, 0.4], MEANS, STDS)


C, U = pair()


def affine(mean, std):
    """The exact denoiser of Gaussian data, in as few operations as there can be."""

    def denoiser(x, node):
        node = node.over(x)
        gain = node.alpha * std**2 / (node.alpha**2 * std**2 + node.sigma**2)
        return Prediction(mean + gain * (x - node.alpha * mean))

    return denoiser


# With some contrast, and a change that is not along it.
RAMP = jnp.linspace(-0.8, 0.9, 16).reshape(1, 4, 4, 1)
KNOWN, LESS = affine(RAMP, 0.3), affine(0.5 * RAMP**2, 0.8)


def constant(value, variance=None):
    """A denoiser that believes in the same data everywhere."""
    value = jnp.asarray(value)
    return lambda x, node: Prediction(jnp.broadcast_to(value, x.shape).astype(x.dtype), variance)


def counted(denoiser, counter, name):
    """Counts the calls when the program runs, not when it is traced."""

    def counting(x, node):
        jax.debug.callback(lambda: counter.update([name]))
        return denoiser(x, node)

    return counting


def walk_counting(make, grid=GRID):
    """Real calls of the conditional and the unconditional denoiser, and what the record says."""
    counter = Counter()
    denoiser = make(counted(KNOWN, counter, "c"), counted(LESS, counter, "u"))
    keys = rng.per_example(jax.random.key(0), jnp.arange(SHAPE[0]))
    x, record = jax.jit(lambda x: sampling.walk(keys, denoiser, solvers.ddim(), grid, x))(X)
    x.block_until_ready()
    jax.effects_barrier()
    assert np.isfinite(np.asarray(x)).all()
    return (counter["c"], counter["u"]), int(record.evaluations)


def float64_node(alpha, sigma):
    """A node in float64, scalar or `(B,)`; to be called where that is enabled."""
    return Node(jnp.zeros(np.shape(alpha), jnp.int32), jnp.asarray(alpha), jnp.asarray(sigma))


# --- two denoisers -------------------------------------------------------------------------------


@functools.cache
def beliefs_and_scores():
    """One compiled program, in float64: guided x0, and noises and scores of both."""
    c, u = pair()

    @jax.jit
    def run(scale, x, node):
        guided = guidance.classifier_free(c.denoiser, u.denoiser, scale)(x, node).x0
        plain = [exact.denoiser(x, node).x0 for exact in (c, u)]
        noises = [eps_from_x0(x0, x, node) for x0 in (guided, *plain)]
        return guided, noises, c.score(x, node), u.score(x, node)

    return run


@given(scale=st.floats(-3, 10), alpha=st.floats(1e-3, 1.0), sigma=st.floats(1e-2, 50.0))
def test_classifier_free_combines_scores_and_noises(scale, alpha, sigma):
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64) * np.hypot(alpha, sigma)
        x0, (eps, eps_c, eps_u), score_c, score_u = beliefs_and_scores()(
            jnp.asarray(scale), x, float64_node(alpha, sigma)
        )
        size = 1e-10 * (1 + abs(scale))
        np.testing.assert_allclose(eps, eps_u + scale * (eps_c - eps_u), atol=size)
        # (alpha x0 - x) / sigma² is the score of the tilted density p(x) p(y | x)^scale.
        np.testing.assert_allclose(
            (alpha * x0 - x) / sigma**2, score_u + scale * (score_c - score_u), atol=size / sigma**2
        )


@pytest.mark.parametrize(
    ("scale", "calls"),
    [
        (1, (10, 0)),
        (0.0, (0, 10)),
        (np.float32(1), (10, 0)),
        (jnp.float32(0), (0, 10)),
        (3.0, (10, 10)),
        (jnp.ones(3), (10, 10)),
        (lambda node: jnp.where(node.sigma > 0.5, 4.0, 1.0), (10, 10)),
    ],
)
def test_a_known_scale_of_one_or_zero_costs_one_call(scale, calls):
    counts = walk_counting(lambda c, u: guidance.classifier_free(c, u, scale))
    assert counts == (calls, sum(calls))


@pytest.mark.parametrize(
    "scale",
    [jnp.array([1.8, 1.0, 0.2]), np.array([1.8, 1, 0.2]), lambda node: (1000 - node.t) / 500.0],
)
def test_scales_of_examples_and_of_nodes(scale):
    node = SCHEDULE.at(jnp.array([100, 500, 900]))
    got = guidance.classifier_free(KNOWN, LESS, scale)(X, node).x0
    for i, w in enumerate([1.8, 1.0, 0.2]):
        alone = guidance.classifier_free(KNOWN, LESS, w)(X[i : i + 1], node[i : i + 1]).x0[0]
        np.testing.assert_allclose(got[i], alone, atol=1e-5)


def test_the_variance_is_the_conditional_one():
    c, u = constant(1.0, variance=jnp.full(SHAPE, 0.3)), constant(0.0, jnp.full(SHAPE, 0.8))
    for denoiser in (
        guidance.classifier_free(c, u, 2.0),
        guidance.adaptive_projected(c, u, 2.0),
        guidance.cfg_plus_plus(c, u, 0.5, GRID),
    ):
        prediction = denoiser(X, GRID[3])
        assert float(prediction.variance.max()) == np.float32(0.3)
        assert prediction.evaluations == 2


def stacked_network(counter):
    """A denoiser of labels and a vector: 0 means no condition."""

    def make(cond):
        def denoiser(x, node):
            jax.debug.callback(lambda: counter.update(["call"]))
            level = jnp.broadcast_to(node.sigma, x.shape[:1])
            vector = jnp.sum(cond["vector"], axis=1)
            gain = jnp.sin(cond["label"] + 3 * level + vector).reshape(-1, 1, 1, 1)
            return Prediction(gain * x, variance=gain + jnp.zeros_like(x))

        return denoiser

    return make


@pytest.mark.parametrize("t", [400, jnp.array([5, 300, 900])])
@pytest.mark.parametrize("scale", [1.0, 3.0, jnp.array([0.0, 2.0, 5.0])])
def test_stacked_is_two_calls_in_one(t, scale):
    counter = Counter()
    make, node = stacked_network(counter), SCHEDULE.at(t)
    cond = {"label": jnp.array([1, 2, 3]), "vector": jnp.arange(6.0).reshape(3, 2)}
    null = jax.tree.map(jnp.zeros_like, cond)
    both = guidance.stack_cond(cond, null)
    assert both["label"].dtype == jnp.int32
    want = guidance.combine(make(cond), make(null), rules.linear(scale))(X, node)
    jax.effects_barrier()
    counter.clear()
    got = guidance.classifier_free_stacked(make(both), scale)(X, node)
    jax.effects_barrier()
    assert counter["call"] == 1
    assert got.evaluations == want.evaluations == 2
    np.testing.assert_allclose(got.x0, want.x0, atol=1e-5)
    np.testing.assert_allclose(got.variance, want.variance, atol=1e-6)


def test_autoguidance_moves_away_from_the_weak_one():
    strong, weak = constant(0.5), constant(0.2)
    np.testing.assert_allclose(
        guidance.autoguidance(strong, weak, 3.0)(X, GRID[0]).x0, 0.2 + 3 * 0.3, rtol=1e-6
    )
    assert guidance.autoguidance(strong, weak, 1.0) is strong


# --- rules ---------------------------------------------------------------------------------------


def beliefs(seed=0):
    c, u = np.random.default_rng(seed).normal(size=(2, *SHAPE))
    return c, u


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_has_the_contrast_of_the_conditional(phi):
    c, u = beliefs()
    rule = rules.rescaled(rules.linear(7.5), phi)
    got = guidance.combine(constant(c), constant(u), rule)(X, GRID[0]).x0
    guided = u + 7.5 * (c - u)
    for i in range(3):
        matched = guided[i] * c[i].std() / guided[i].std()
        np.testing.assert_allclose(got[i], phi * matched + (1 - phi) * guided[i], rtol=2e-5)
    if phi == 1:
        np.testing.assert_allclose(np.std(got, axis=(1, 2, 3)), c.std(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("norm_threshold", [None, 2.5, 100.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_projected_splits_the_change_of_each_example(eta, norm_threshold):
    c, u = beliefs()
    got = guidance.adaptive_projected(constant(c), constant(u), 4.0, eta, norm_threshold)
    got = np.asarray(got(X, GRID[0]).x0)
    for i in range(3):
        d, unit = c[i] - u[i], c[i] / np.linalg.norm(c[i])
        if norm_threshold == 2.5:
            assert np.linalg.norm(d) > 2.5
            d = d * 2.5 / np.linalg.norm(d)
        parallel = np.sum(d * unit) * unit
        np.testing.assert_allclose(got[i], c[i] + 3 * (d - parallel + eta * parallel), atol=1e-5)
        if eta == 0:
            assert abs(np.sum((got[i] - c[i]) * c[i])) < 1e-4
    if eta == 1 and norm_threshold != 2.5:
        plain = guidance.classifier_free(constant(c), constant(u), 4.0)(X, GRID[0]).x0
        np.testing.assert_allclose(got, plain, atol=1e-5)


def test_projected_of_scale_one_is_the_conditional():
    assert guidance.adaptive_projected(C.denoiser, U.denoiser, 1.0) is C.denoiser
    counts = walk_counting(lambda c, u: guidance.adaptive_projected(c, u, 0.0))
    assert counts == ((10, 10), 20)


# --- CFG++ ---------------------------------------------------------------------------------------


def published_step(x, c, u, scale, now, next):
    """The update of Chung et al.: guided clean data, renoised with the unconditional noise."""
    eps_u = (x - now[0] * u) / now[1]
    return next[0] * (u + scale * (c - u)) + next[1] * eps_u


def gaussian64(mean, std):
    return lambda x, a, s: mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)


def up_and_down():
    """Indices of a grid that goes up again, with a node visited twice and left two ways."""
    t = [999, 700, 400, 600, 300, 400, 100, 0]
    return np.append(np.asarray(SCHEDULE.nodes.alpha, np.float64)[t], 1.0)


GRIDS64 = {
    "linear": np.append(np.asarray(SCHEDULE.nodes.alpha, np.float64)[999::-50], 1.0),
    "from_no_signal": np.append(0.0, np.sqrt(np.linspace(0.05, 0.98, 12))),
    "up_and_down": up_and_down(),
}


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("name", GRIDS64)
def test_cfg_plus_plus_is_the_published_update(name, scale):
    alpha = GRIDS64[name]
    sigma = np.sqrt(1 - alpha**2)
    c, u = gaussian64(0.7, 0.2), gaussian64(-0.1, 0.5)
    nodes = list(zip(alpha, sigma, strict=True))
    with jax.enable_x64(True):
        grid = float64_node(alpha, sigma)
        guided = guidance.cfg_plus_plus(
            denoisers.gaussian([0.7], 0.2).denoiser,
            denoisers.gaussian([-0.1], 0.5).denoiser, scale, grid,
        )  # fmt: skip
        step, x = jax.jit(solvers.ddim().step, static_argnums=1), np.array([[0.4], [-1.3]])
        for i, (now, next) in enumerate(itertools.pairwise(nodes)):
            if next[0] < now[0]:  # the loop goes up by itself
                continue
            want = published_step(x, c(x, *now), u(x, *now), scale, now, next)
            state = solvers.ddim().init(jnp.asarray(x), grid[i])
            got, _ = step(rng.per_example(jax.random.key(i), jnp.arange(2)), guided, state,
                          grid[i], grid[i + 1])  # fmt: skip
            # The scale is a difference of levels that differ by some per cent.
            np.testing.assert_allclose(got.x, want, rtol=1e-10, atol=1e-10)
            x = want


def test_cfg_plus_plus_walks_with_ddim():
    grid = grids.trailing(SCHEDULE, 20)
    nodes = list(zip(np.float64(grid.alpha), np.float64(grid.sigma), strict=True))
    c, u = gaussian64(0.7, 0.2), gaussian64(-0.1, 0.5)
    want = np.asarray(X[:, :1, :1, 0].reshape(3, 1), np.float64)
    start = jnp.asarray(want, jnp.float32)
    for now, next in itertools.pairwise(nodes):
        want = published_step(want, c(want, *now), u(want, *now), 0.6, now, next)
    guided = guidance.cfg_plus_plus(
        denoisers.gaussian([0.7], 0.2).denoiser, denoisers.gaussian([-0.1], 0.5).denoiser, 0.6, grid
    )
    keys = rng.per_example(jax.random.key(0), jnp.arange(3))
    x, record = sampling.walk(keys, guided, solvers.ddim(), grid, start)
    np.testing.assert_allclose(x, want, atol=1e-4)
    assert int(record.evaluations) == 40
    plain = guidance.classifier_free(
        denoisers.gaussian([0.7], 0.2).denoiser, denoisers.gaussian([-0.1], 0.5).denoiser, 0.6
    )
    x, _ = sampling.walk(keys, plain, solvers.ddim(), grid, start)
    assert np.abs(x - want).max() > 1e-2


@pytest.mark.parametrize("num_steps", [7, 1000])
def test_cfg_plus_plus_finds_the_next_node_in_float32(num_steps):
    grid = grids.trailing(SCHEDULE, num_steps)
    # With beliefs 1 and 0 the guided clean data are the scale itself.
    scale = jax.jit(
        lambda node: guidance.cfg_plus_plus(constant(1.0), constant(0.0), 0.5, grid)(
            jnp.zeros((num_steps, 1)), node
        ).x0[:, 0]
    )
    level = np.float64(grid.sigma) / np.float64(grid.alpha)
    want = 0.5 / (1 - level[1:] / level[:-1])
    nodes = grid[:-1]
    np.testing.assert_allclose(scale(nodes), want, rtol=1e-3)
    # The same nodes computed in another way differ in the last digits.
    for factor in (1 - 1e-6, 1 + 1e-6):
        moved = Node(nodes.t, nodes.alpha, nodes.sigma * np.float32(factor))
        np.testing.assert_allclose(scale(moved), want, rtol=2e-2)
    # One scalar node at a time says the same; after the last move there is no noise to correct.
    one = jax.jit(
        lambda i: guidance.cfg_plus_plus(constant(1.0), constant(0.0), 0.5, grid)(
            jnp.zeros((1, 1)), grid[i]
        ).x0[0, 0]
    )
    for i in (0, num_steps // 2, num_steps - 1):
        np.testing.assert_allclose(one(i), want[i], rtol=1e-3)
    assert float(one(num_steps)) == 0.5
    assert guidance.cfg_plus_plus(C.denoiser, U.denoiser, 0.0, grid) is U.denoiser


# --- the interval --------------------------------------------------------------------------------


def levels(grid):
    return np.asarray(grid.sigma / np.maximum(grid.alpha, 1e-30))


def test_outside_of_the_interval_the_guided_call_is_not_paid_for():
    # The bounds are the levels of two nodes: the upper is inside, the lower is not.
    level = levels(GRID)
    low, high = level[7], level[2]

    def make(c, u):
        return guidance.interval(guidance.classifier_free(c, u, 3.0), c, low, high)

    assert walk_counting(make) == ((10, 5), 15)
    never = lambda c, u: guidance.interval(guidance.classifier_free(c, u, 3.0), u, 1e3, 1e4)  # noqa: E731
    assert walk_counting(never) == ((0, 10), 10)


def test_interval_chooses_by_noise_to_signal():
    inside, outside = constant(1.0), constant(0.0)
    denoiser = guidance.interval(inside, outside, 0.0, np.inf)
    assert float(denoiser(X, CLEAN).x0.max()) == 0
    for node in (SCHEDULE.at(0), SCHEDULE.at(999), NO_SIGNAL):
        assert float(denoiser(X, node).x0.min()) == 1
    assert float(guidance.interval(inside, outside, 0.0, 1e6)(X, NO_SIGNAL).x0.max()) == 0
    log_snr = float(SCHEDULE.log_snr(400))
    level = np.exp(-log_snr / 2)
    for bounds, want in (((0.99 * level, 1.01 * level), 1), ((1.01 * level, 2 * level), 0)):
        got = guidance.interval(inside, outside, *bounds)(X, SCHEDULE.at(400)).x0
        np.testing.assert_array_equal(got, np.full(SHAPE, want))


def test_with_nodes_of_their_own_examples_choose_for_themselves():
    nodes = jax.tree.map(lambda *f: jnp.stack(f), CLEAN, SCHEDULE.at(400), NO_SIGNAL)
    c, u = constant(1.0, jnp.full(SHAPE, 0.3)), constant(0.0, jnp.full(SHAPE, 0.8))
    prediction = guidance.interval(guidance.classifier_free(c, u, 3.0), u, 0.1, 10.0)(X, nodes)
    want = np.broadcast_to(np.float32([0, 3, 0]).reshape(3, 1, 1, 1), SHAPE)
    np.testing.assert_array_equal(prediction.x0, want)
    np.testing.assert_allclose(prediction.variance[:, 0, 0, 0], [0.8, 0.3, 0.8])
    assert int(prediction.evaluations) == 3


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("own_nodes", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_exact_classifier_makes_the_unconditional_denoiser_conditional(scale, own_nodes):
    with jax.enable_x64(True):
        c, u = pair()
        alpha = np.array([0.95, 0.5, 0.02]) if own_nodes else 0.7
        node = float64_node(alpha, np.sqrt(1 - np.square(alpha)))
        x = jnp.asarray(X, jnp.float64)

        def log_prob(x, node):
            return np.log(0.4) + c.log_density(x, node) - u.log_density(x, node)

        got = jax.jit(guidance.classifier(u.denoiser, log_prob, scale))(x, node)
        want = jax.jit(guidance.classifier_free(c.denoiser, u.denoiser, scale))(x, node)
        np.testing.assert_allclose(got.x0, want.x0, rtol=1e-9, atol=1e-9)
        assert got.evaluations == 1
        # The condition matters here, so the test can fail.
        assert np.abs(want.x0 - jax.jit(u.denoiser)(x, node).x0).max() > 0.1


def measured(mean, std, noise):
    """Data N(mean, std²) measured with noise: the energy, and exact E[x0 | x, y] in float64."""
    y = np.array([0.9, -0.4, 0.1])

    def energy_fn(x0):
        return jnp.sum((x0 - y[:, None]) ** 2, axis=1) / (2 * noise**2)

    def posterior(x, alpha, sigma):
        precision = 1 / std**2 + alpha**2 / sigma**2 + 1 / noise**2
        return (mean / std**2 + alpha * x / sigma**2 + y[:, None] / noise**2) / precision

    return energy_fn, posterior


@pytest.mark.parametrize("alpha", [0.99, 0.6, 0.05])
def test_energy_is_exact_for_gaussian_measurements(alpha):
    # p(y | x) has the measurement's variance and that of x0 given x; what diffusion posterior
    # sampling leaves out of it is a factor, which the scale can put back.
    mean, std, noise, sigma = 0.3, 0.5, 0.4, np.sqrt(1 - alpha**2)
    energy_fn, posterior = measured(mean, std, noise)

    def scale(node):
        left = (node.sigma * std) ** 2 / ((node.alpha * std) ** 2 + node.sigma**2)
        return noise**2 / (noise**2 + left)

    with jax.enable_x64(True):
        exact, node = denoisers.gaussian([mean], [std]), float64_node(alpha, sigma)
        x = np.array([[0.4], [-1.3], [2.0]])
        got = guidance.energy(exact.denoiser, energy_fn, scale)(jnp.asarray(x), node).x0
        np.testing.assert_allclose(got, posterior(x, alpha, sigma), rtol=1e-9)
        # At scale 1 it is DPS's approximation.
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        y = np.array([[0.9], [-0.4], [0.1]])
        want = x0 - sigma**2 / alpha * gain * (x0 - y) / noise**2
        got = guidance.energy(exact.denoiser, energy_fn)(jnp.asarray(x), node).x0
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_energy_asks_the_network_once():
    def make(c, u):
        guided = guidance.classifier_free(c, u, 2.0)
        return guidance.energy(guided, lambda x0: jnp.sum(x0**2, axis=(1, 2, 3)), 0.01)

    assert walk_counting(make) == ((10, 10), 20)


def test_gradients_leave_the_ends_alone():
    def log_prob(x, node):
        return jnp.sum(x, axis=(1, 2, 3))

    for node in (CLEAN, NO_SIGNAL):
        for denoiser in (
            guidance.classifier(LESS, log_prob),
            guidance.energy(LESS, lambda x0: jnp.sum(x0**2, axis=(1, 2, 3))),
        ):
            np.testing.assert_array_equal(denoiser(X, node).x0, LESS(X, node).x0)


# --- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("percentile", "limit"), [(0.9, 1.0), (0.5, 0.25), (1.0, 1.0)])
def test_dynamic_threshold_is_each_examples_own(percentile, limit):
    x0 = np.random.default_rng(0).normal(size=SHAPE) * np.array([0.1, 1, 5]).reshape(3, 1, 1, 1)
    got = guidance.dynamic_threshold(constant(x0), percentile, limit)(X, GRID[0]).x0
    for i in range(3):
        bound = max(np.quantile(np.abs(x0[i]), percentile), limit)
        np.testing.assert_allclose(
            got[i], np.clip(x0[i], -bound, bound) / bound * limit, rtol=1e-5, atol=1e-7
        )
    if limit == 1:
        np.testing.assert_allclose(got[0], x0[0], rtol=1e-6)  # within the range already
        assert np.abs(got[2] - np.clip(x0[2], -1, 1)).max() > 0.1
    assert np.abs(got).max() <= limit * (1 + 1e-6)


def test_clipping_before_and_after_guidance_differ():
    c, u = constant(1.5), constant(1.2)
    after = guidance.clip_x0(guidance.classifier_free(c, u, 3.0))
    before = guidance.classifier_free(guidance.clip_x0(c, -2, 1.3), guidance.clip_x0(u), 3.0)
    np.testing.assert_allclose(after(X, GRID[0]).x0, 1.0)
    np.testing.assert_allclose(before(X, GRID[0]).x0, 1 + 3 * 0.3, rtol=1e-6)
    # Under a gradient too: clipped values have none.
    pull = lambda x0: jnp.sum((x0 - 2) ** 2, axis=(1, 2, 3))  # noqa: E731
    linear = lambda x, node: Prediction(2 + 0.1 * x)  # noqa: E731
    inside = guidance.energy(guidance.clip_x0(linear), pull)(X, GRID[0]).x0
    np.testing.assert_array_equal(inside, np.ones(SHAPE))
    assert np.abs(guidance.energy(linear, pull)(X, GRID[5]).x0 - (2 + 0.1 * X)).max() > 1e-3


# --- what all of them have in common -------------------------------------------------------------


def chain(c, u):
    guided = guidance.combine(c, u, rules.rescaled(rules.projected(4.0, 0.2, 3.0), 0.5))
    guided = guidance.energy(guided, lambda x0: jnp.sum(x0**2, axis=(1, 2, 3)), 0.05)
    return guidance.dynamic_threshold(guidance.interval(guided, c, 0.05, 50.0), 0.9)


# Each made of a conditional and an unconditional denoiser, with the evaluations it takes.
WRAPPERS = {
    "classifier_free": (lambda c, u: guidance.classifier_free(c, u, 3.0), 2),
    "scale_of_node": (lambda c, u: guidance.classifier_free(c, u, lambda n: 1 + n.sigma), 2),
    "rescaled": (lambda c, u: guidance.combine(c, u, rules.rescaled(rules.linear(5.0))), 2),
    "adaptive_projected": (lambda c, u: guidance.adaptive_projected(c, u, 5.0, 0.1, 1.0), 2),
    "autoguidance": (lambda c, u: guidance.autoguidance(c, u, 2.0), 2),
    "cfg_plus_plus": (lambda c, u: guidance.cfg_plus_plus(c, u, 0.5, GRID), 2),
    "interval": (
        lambda c, u: guidance.interval(guidance.classifier_free(c, u, 3.0), c, 0.0, 9.0), None,
    ),
    "classifier": (
        lambda c, u: guidance.classifier(u, lambda x, n: -jnp.sum(x**2, axis=(1, 2, 3)), 0.3), 1,
    ),
    "energy": (lambda c, u: guidance.energy(u, lambda x0: jnp.sum(x0**4, axis=(1, 2, 3)), 0.1), 1),
    "clip_x0": (lambda c, u: guidance.clip_x0(c), 1),
    "dynamic_threshold": (lambda c, u: guidance.dynamic_threshold(c, 0.8, 0.5), 1),
    "chain": (chain, None),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_example_does_not_see_its_neighbours(name):
    make, evaluations = WRAPPERS[name]
    predict = jax.jit(make(KNOWN, LESS))
    first = []
    for t in (300, jnp.array([300, 900, 20])):
        whole = predict(X, SCHEDULE.at(t))
        assert evaluations in (None, int(whole.evaluations))
        assert whole.x0.shape == SHAPE
        assert whole.x0.dtype == X.dtype
        others = predict(X.at[1:].set(-7 * X[1:]), SCHEDULE.at(t))
        np.testing.assert_array_equal(others.x0[0], whole.x0[0])
        first.append(whole.x0[0])
    # A node of one's own says what the same node of all says.
    np.testing.assert_allclose(first[0], first[1], atol=1e-5)
    assert predict._cache_size() == 2


@pytest.mark.parametrize("name", WRAPPERS)
def test_values_and_gradients_are_finite_everywhere(name):
    denoiser = WRAPPERS[name][0](KNOWN, LESS)
    value = jax.jit(jax.value_and_grad(lambda x, node: jnp.sum(denoiser(x, node).x0 ** 2)))
    for node, x in itertools.product(
        (CLEAN, SCHEDULE.at(0), SCHEDULE.at(999), NO_SIGNAL), (X, jnp.zeros(SHAPE))
    ):
        loss, gradient = value(x, node)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["rescaled", "adaptive_projected", "dynamic_threshold", "chain"])
def test_beliefs_without_contrast_or_difference_are_finite(name):
    @jax.jit
    @jax.value_and_grad
    def value(x, c, u):
        flat = [lambda x, node, v=v: Prediction(v + 0 * x) for v in (c, u)]
        return jnp.sum(WRAPPERS[name][0](*flat)(x, GRID[5]).x0)

    for c, u in ((0.0, 0.0), (0.5, 0.5), (0.0, 0.5)):
        loss, gradient = value(X, c, u)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


def test_scales_are_data_to_a_compiled_program():
    @jax.jit
    def run(scale, low, high, x, node):
        guided = guidance.classifier_free(KNOWN, LESS, scale)
        return guidance.clip_x0(guidance.interval(guided, KNOWN, low, high))(x, node).x0

    node = SCHEDULE.at(500)
    got = [run(s, 0.1, 10.0, X, node) for s in (0.0, 1.0, 3.0)]
    assert run._cache_size() == 1
    np.testing.assert_allclose(got[0], jnp.clip(LESS(X, node).x0, -1, 1), atol=1e-6)
    np.testing.assert_allclose(got[1], jnp.clip(KNOWN(X, node).x0, -1, 1), atol=1e-6)
    np.testing.assert_allclose(
        run(3.0, 10.0, 20.0, X, node), jnp.clip(KNOWN(X, node).x0, -1, 1), atol=1e-6
    )
    assert np.abs(got[2] - got[1]).max() > 1e-3


def test_the_whole_chain_counts_what_it_calls():
    counts, evaluations = walk_counting(chain)
    level = levels(GRID)
    inside = int(np.sum((level[:-1] > 0.05) & (level[:-1] <= 50)))
    assert 0 < inside < 10
    assert counts == (10, inside)
    assert evaluations == 10 + inside


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda s: guidance.classifier_free(KNOWN, LESS, s),
        lambda s: guidance.classifier_free_stacked(KNOWN, s),
        lambda s: guidance.autoguidance(KNOWN, LESS, s),
        lambda s: guidance.adaptive_projected(KNOWN, LESS, s),
        lambda s: guidance.cfg_plus_plus(KNOWN, LESS, s, GRID),
        lambda s: guidance.classifier(KNOWN, lambda x, n: x[:, 0, 0, 0], s),
        lambda s: guidance.energy(KNOWN, lambda x0: x0[:, 0, 0, 0], s),
    ],
)
def test_bad_scales_are_refused(make):
    for scale in ("3", None, True, [1.0, 2.0]):
        with pytest.raises(TypeError, match=r"scale must be a number, an array \(B,\)"):
            make(scale)
    with pytest.raises(ValueError, match=r"scale must have shape \(\) or \(B,\), got \(3, 1\)"):
        make(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        make(float("nan"))
    with pytest.raises(ValueError, match=r"scale must have shape \(\) or \(4,\)"):
        jax.eval_shape(make(jnp.ones(3)), jnp.zeros((4, *SHAPE[1:])), GRID[5])


@pytest.mark.parametrize("t", [5, jnp.array([5, 300, 900])])
def test_an_interval_between_unlike_predictions_is_refused(t):
    c, u = constant(1.0, variance=jnp.full(SHAPE, 0.3)), constant(0.0)
    with pytest.raises(ValueError, match="must both predict a variance, or neither"):
        guidance.interval(c, u, 0.1, 10.0)(X, SCHEDULE.at(t))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: rules.rescaled(rules.linear(2.0), 1.5), "phi must lie in"),
        (lambda: rules.projected(2.0, 0.0, 0.0), "norm_threshold must be positive, or None"),
        (lambda: guidance.cfg_plus_plus(KNOWN, LESS, 0.5, GRID[0]), "a grid needs"),
        (lambda: guidance.interval(KNOWN, LESS, 2.0, 1.0), "0 <= low < high"),
        (lambda: guidance.interval(KNOWN, LESS, -1.0, 1.0), "0 <= low < high"),
        (lambda: guidance.dynamic_threshold(KNOWN, 99.5), "percentile must be a share"),
        (lambda: guidance.dynamic_threshold(KNOWN, limit=0), "limit must be positive"),
        (lambda: guidance.stack_cond({"label": X}, {"vector": X}), "the same structure"),
        (lambda: guidance.stack_cond({"label": X}, {"label": X[:1]}), "the same shapes"),
        (lambda: guidance.stack_cond(jnp.int32(3), jnp.int32(10)), "the same shapes"),
        (lambda: guidance.classifier(KNOWN, lambda x, n: x.sum())(X, GRID[0]), "log_prob"),
        (lambda: guidance.energy(KNOWN, lambda x0: x0**2)(X, GRID[0]), "energy_fn must"),
        (
            lambda: guidance.classifier_free_stacked(lambda x, n: Prediction(x[:3]), 2.0)(
                X, GRID[0]
            ),
            "stacked batch of 6",
        ),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
