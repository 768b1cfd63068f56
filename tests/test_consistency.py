"""Consistency models on data whose consistency function is known.

With Gaussian data N(m, s²) a trajectory of the probability-flow ODE keeps
(x - alpha m) / sqrt(alpha² s² + sigma²), so that the exact consistency function is affine in x.
Over a grid, the fixed point of both losses is affine too: the composition of DDIM steps of the
exact denoiser, since DDIM's step is the mean of x' given x for the same data and noise.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import denoisers, grids, losses, predictions, rng, sampling, schedules, solvers
from jaxdiff.base import Node, Prediction

SCHEDULE = schedules.linear()
ZERO_SNR = schedules.from_alphas_bar(np.linspace(0.99, 0, 10))
MEAN, STD = 0.6, 0.4
GAUSSIAN = denoisers.gaussian([MEAN], [STD])
ROWS = {name: getattr(predictions, name) for name in ("eps", "v", "score", "flow")}
ROWS["edm"] = predictions.edm(0.5)
FALSE_ALARM = 1e-6  # of each statistical test below
X0 = jax.random.normal(jax.random.key(7), (6, 4, 4, 2))


def gaussian_teacher(cond):
    return GAUSSIAN.denoiser


def linear_network(params, x, noise_level, cond):
    return params * x + 0.1


def points(grid):
    return list(zip(np.float64(grid.alpha), np.float64(grid.sigma), strict=True))


def exploding(ratios):
    """A grid with alpha = 1 and times in [0, 1]."""
    ratios = jnp.asarray(ratios, jnp.float32)
    return Node(jnp.linspace(1, 0, ratios.size), jnp.ones_like(ratios), ratios)


def exact_table(grid):
    """Slope and offset of the exact consistency function at each node, float64, `(N+1, 2)`."""
    a, s = np.array(points(grid)).T
    end = np.hypot(STD, s[-1] / a[-1])
    slope = end / np.hypot(a * STD, s)
    return np.stack([slope, MEAN - slope * a * MEAN], axis=1)


def ddim_table(grid):
    """The same of the composition of DDIM steps of the exact denoiser to the grid's end."""
    nodes = points(grid)
    table = [(1 / nodes[-1][0], 0.0)]
    for (a, s), (b, r) in reversed(list(itertools.pairwise(nodes))):
        gain = a * STD**2 / (a**2 * STD**2 + s**2)
        ahead = b - r * a / s
        slope, offset = r / s + ahead * gain, ahead * MEAN * (1 - gain * a)
        outer, shift = table[-1]
        table.append((outer * slope, outer * offset + shift))
    return np.array(table[::-1])


def denoiser_table(grid):
    """The same of the exact denoiser, which is no consistency function."""
    gain = [a * STD**2 / (a**2 * STD**2 + s**2) for a, s in points(grid)]
    return np.array([(g, MEAN * (1 - g * a)) for g, (a, _) in zip(gain, points(grid), strict=True)])


def tabular(grid):
    """A network whose parameters are a table `(N+1, 2)` of affine consistency functions.

    v prediction: x0 = (alpha x - sigma v) / (alpha² + sigma²), solved for v.
    """

    def apply_fn(table, x, noise_level, cond):
        i = jnp.argmax(noise_level[:, None] == grid.t[None], axis=1)
        node = grid[i].over(x)
        x0 = table[i, 0][:, None] * x + table[i, 1][:, None]
        scale = node.alpha**2 + node.sigma**2
        return (node.alpha * x - scale * x0) / jnp.where(node.sigma > 0, node.sigma, 1)

    return apply_fn


def with_sigma_min(make, grid, sigma_min):
    """`tabular` where the trajectories end at sigma_min."""
    shifted = Node(grid.t, grid.alpha, jnp.maximum(grid.sigma - sigma_min * grid.alpha, 0))
    return make(shifted)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("ratio", [0.0, 0.002, 0.5])
def test_the_end_is_left_alone_whatever_the_network_says(name, ratio):
    x = X0[:2]
    for alpha in (1.0, 0.8):
        node = Node(jnp.int32(-1), jnp.float32(alpha), jnp.float32(ratio * alpha))
        for output in (7.0, jnp.nan):
            denoiser = losses.consistency_denoiser(
                lambda p, x, t, c, value=output: jnp.full_like(x, value),
                None, SCHEDULE, ROWS[name], sigma_min=ratio,
            )  # fmt: skip
            np.testing.assert_allclose(denoiser(x, node).x0, x / alpha, rtol=1e-6)
            cleaner = Node(node.t, node.alpha, node.sigma / 2)
            np.testing.assert_allclose(denoiser(x, cleaner).x0, x / alpha, rtol=1e-6)
        # And near it the output hardly counts.
        near = Node(node.t, node.alpha, (ratio + 1e-4) * node.alpha)
        believed = losses.consistency_denoiser(
            lambda p, x, t, c: jnp.ones_like(x), None, SCHEDULE, ROWS[name], sigma_min=ratio
        )(x, near).x0
        assert np.abs(believed - x / alpha).max() < 1e-3


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_coefficients_are_those_of_the_paper(alpha):
    # Song et al. 2023, appendix C, for x / alpha; c_out up to sigma_min / (2 sigma_data).
    sigma_data, sigma_min = 0.5, 0.002
    ratio = np.geomspace(0.002, 80, 50)
    node = Node(jnp.zeros(50, int), jnp.full(50, alpha), jnp.asarray(alpha * ratio, jnp.float32))

    def f(x, output):
        network = lambda *_: jnp.full((50, 1), output)  # noqa: E731
        row = predictions.edm(sigma_data)
        denoiser = losses.consistency_denoiser(network, None, SCHEDULE, row, sigma_min=sigma_min)
        return np.float64(denoiser(jnp.full((50, 1), alpha * x), node).x0)[:, 0]

    from_end = ratio - sigma_min
    c_skip = sigma_data**2 / (from_end**2 + sigma_data**2)
    c_out = sigma_data * from_end / np.hypot(sigma_data, ratio)
    np.testing.assert_allclose(f(1.0, 0.0), c_skip, rtol=1e-4)
    limit = 1.1 * sigma_min / (2 * sigma_data)
    np.testing.assert_allclose(f(0.0, 1.0), c_out, rtol=limit, atol=1e-7)


def test_with_clean_ends_it_is_the_denoiser_of_the_network():
    node = SCHEDULE.at(jnp.array([0, 3, 100, 500, 700, 999]))
    for row in ROWS.values():
        one = losses.consistency_denoiser(linear_network, 0.7, SCHEDULE, row)
        other = denoisers.from_network(linear_network, 0.7, SCHEDULE, row)
        np.testing.assert_allclose(one(X0, node).x0, other(X0, node).x0, rtol=1e-6, atol=1e-6)


def test_distillation_has_no_loss_at_the_composition_of_the_solvers_steps():
    grid = grids.trailing(SCHEDULE, 12)
    batch = {"x0": GAUSSIAN.sample(jax.random.key(1), 512)}
    loss = jax.jit(
        losses.consistency_distillation(
            tabular(grid), gaussian_teacher, solvers.ddim(), grid, predictions.v,
            distance=losses.squared,
        )
    )  # fmt: skip
    right, _ = loss(jnp.asarray(ddim_table(grid), jnp.float32), jax.random.key(0), batch)
    wrong, _ = loss(jnp.asarray(denoiser_table(grid), jnp.float32), jax.random.key(0), batch)
    assert np.max(right) < 1e-11
    assert np.mean(wrong) > 1e-3


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_distillation_of_the_exact_teacher_has_no_loss_at_the_exact_function(name):
    # In the limit of a fine grid, and at the rate of the solver's local error: the square of h²
    # for DDIM, of h³ for Heun.
    solver, rate = {"ddim": (solvers.ddim(), 4), "heun": (solvers.heun(), 6)}[name]
    counts, values = np.array([8, 24]), []
    for num in counts:
        grid = exploding(np.geomspace(4, 0.25, num + 1))
        loss = jax.jit(
            losses.consistency_distillation(
                with_sigma_min(tabular, grid, 0.25), gaussian_teacher, solver, grid, predictions.v,
                distance=losses.squared, sigma_min=0.25,
            )
        )  # fmt: skip
        batch = {"x0": GAUSSIAN.sample(jax.random.key(1), 512)}
        exact, _ = loss(jnp.asarray(exact_table(grid), jnp.float32), jax.random.key(0), batch)
        wrong, _ = loss(jnp.asarray(denoiser_table(grid), jnp.float32), jax.random.key(0), batch)
        assert np.mean(wrong) > 100 * np.mean(exact)
        values.append(np.mean(np.float64(exact)))
    assert values[-1] < 1e-5
    slope = -np.polyfit(np.log(counts), np.log(values), 1)[0]
    assert abs(slope - rate) < 0.5


@pytest.mark.parametrize("kind", ["improved", "original"])
def test_training_stands_still_at_the_composition_of_ddim_steps_and_only_there(kind):
    # On data alone, without the exact denoiser: there its gradient is zero on average.
    grid, num = grids.trailing(SCHEDULE, 6), 20000
    likely = [0.3, 0.2, 0.2, 0.1, 0.1, 0.1]
    options = {} if kind == "improved" else {"weighting": None, "probabilities": likely}
    loss = losses.consistency_training(
        tabular(grid), grid, predictions.v, distance=losses.squared, **options
    )
    batch = {"x0": GAUSSIAN.sample(jax.random.key(1), num)}
    gradients = jax.jit(jax.jacfwd(lambda table: loss(table, jax.random.key(0), batch)[0]))

    def score(table):
        g = np.float64(gradients(jnp.asarray(table, jnp.float32)))[:, :-1].reshape(num, -1)
        assert np.all(g.any(axis=0))
        return np.abs(g.mean(axis=0) / (g.std(axis=0) / np.sqrt(num))).max()

    bound = stats.norm.isf(FALSE_ALARM / 2 / 12)
    assert score(ddim_table(grid)) < bound
    for wrong in (exact_table(grid), denoiser_table(grid), ddim_table(grid) * 1.3):
        assert score(wrong) > 2 * bound


def test_both_nodes_have_the_same_data_noise_and_dropout():
    grid, key, seen = grids.trailing(SCHEDULE, 8), jax.random.key(0), []

    def apply_fn(params, x, noise_level, cond, dropout_keys):
        seen.append((x, noise_level, cond, jax.random.key_data(dropout_keys)))
        return params * x

    cond = jnp.arange(6)
    loss = losses.consistency_training(apply_fn, grid, predictions.v, dropout=True)
    _, aux = loss(0.3, key, {"x0": X0, "cond": cond})
    keys = rng.per_example(key, jnp.arange(6))
    eps = rng.normal(rng.stream(keys, rng.Stream.NOISE), (4, 4, 2))
    dropout = jax.random.key_data(rng.stream(keys, rng.Stream.DROPOUT))
    u = np.asarray(rng.uniform(rng.stream(keys, rng.Stream.TIME)))
    i = np.floor(u * 8).astype(int)
    assert len(seen) == 2
    calls = {tuple(t.tolist()): (x, c, k) for x, t, c, k in seen}
    for node in (grid[i], grid[i + 1]):
        x, c, k = calls[tuple(node.t.tolist())]
        np.testing.assert_allclose(
            x, node.over(X0).alpha * X0 + node.over(X0).sigma * eps, rtol=1e-5, atol=1e-6
        )
        assert c is cond
        np.testing.assert_array_equal(k, dropout)
    np.testing.assert_array_equal(aux["t"], grid.t[i])


def test_dropout_keys_may_be_used_for_both_nodes():
    # Under the key-reuse checks of these tests.
    def apply_fn(params, x, noise_level, cond, dropout_keys):
        return params * x * (rng.normal(dropout_keys, (4, 4, 2)) > 0)

    grid = grids.trailing(SCHEDULE, 8)
    loss = losses.consistency_training(apply_fn, grid, predictions.v, dropout=True)
    for run in (loss, jax.jit(loss)):
        assert np.isfinite(run(0.3, jax.random.key(0), {"x0": X0})[0]).all()


def test_weights_and_distances_by_default():
    # Song & Dhariwal 2023 for training: 1 / (difference of sigma/alpha); 1 for distillation.
    grid, batch, x0 = grids.trailing(SCHEDULE, 8), {"x0": X0}, X0[:, 0, 0, :1]
    make = partial(losses.consistency_training, linear_network, grid, predictions.v)
    mean, aux = make(distance=losses.squared, weighting=None)(0.3, jax.random.key(0), batch)
    huber = np.sqrt(np.float64(mean) + 0.00054**2) - 0.00054
    ratio = np.float64(grid.sigma) / np.float64(grid.alpha)
    i = np.argmax(np.asarray(aux["t"])[:, None] == np.asarray(grid.t), axis=1)
    got, aux = make()(0.3, jax.random.key(0), batch)
    np.testing.assert_allclose(got, huber / (ratio[i] - ratio[i + 1]), rtol=1e-4)
    np.testing.assert_array_equal(aux["loss"], got)
    make = partial(
        losses.consistency_distillation, linear_network, gaussian_teacher, solvers.ddim(), grid,
        predictions.v,
    )  # fmt: skip
    mean, _ = make(distance=losses.squared)(0.3, jax.random.key(0), {"x0": x0})
    huber = np.sqrt(np.float64(mean) + 0.00054**2) - 0.00054
    np.testing.assert_allclose(make()(0.3, jax.random.key(0), {"x0": x0})[0], huber, rtol=1e-3)


@pytest.mark.parametrize("kind", ["training", "distillation"])
def test_the_target_is_held(kind):
    # The gradient is that of the noisier node alone.
    grid, x0 = grids.trailing(SCHEDULE, 4), X0[:, 0, 0, :1]
    if kind == "training":
        loss = losses.consistency_training(
            linear_network, grid, predictions.v, distance=losses.squared, weighting=None
        )
    else:
        loss = losses.consistency_distillation(
            linear_network, gaussian_teacher, solvers.ddim(), grid, predictions.v,
            distance=losses.squared,
        )  # fmt: skip
    key = jax.random.key(0)
    got = jax.jacfwd(lambda p: loss(p, key, {"x0": x0})[0])(0.3)
    keys = rng.per_example(key, jnp.arange(6))
    eps = rng.normal(rng.stream(keys, rng.Stream.NOISE), (1,))
    i = np.floor(np.asarray(rng.uniform(rng.stream(keys, rng.Stream.TIME))) * 4).astype(int)
    now, next = grid[i], grid[i + 1]
    (a, s), (b, r) = ((n.over(x0).alpha, n.over(x0).sigma) for n in (now, next))
    x = a * x0 + s * eps
    if kind == "training":
        after = b * x0 + r * eps
    else:
        clean = GAUSSIAN.denoiser(x, now).x0
        after = b * clean + r * (x - a * clean) / s

    def f(params, x, a, s):  # v prediction
        return a * x - s * (params * x + 0.1)

    expected = 2 * (f(0.3, x, a, s) - f(0.3, after, b, r)) * (-s * x)
    np.testing.assert_allclose(got, expected[:, 0], rtol=1e-3, atol=1e-6)


def test_distances_and_masks():
    a, b = X0, X0[::-1]
    mask = np.zeros((6, 4, 4, 1), np.float32)
    mask[:, :2] = 1
    square = (np.float64(a) - np.float64(b)) ** 2
    np.testing.assert_allclose(losses.squared(a, b), square.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(losses.squared(a, b, mask), square[:, :2].mean((1, 2, 3)), rtol=1e-5)
    # Song & Dhariwal 2023: sqrt(|a - b|² + c²) - c with c = 0.00054 sqrt(d), over sqrt(d).
    for scale in (1.0, 1e-3, 1e-6):
        total, c, d = scale**2 * square.sum((1, 2, 3)), 0.00054 * np.sqrt(32), 32
        expected = total / (np.sqrt(total + c**2) + c) / np.sqrt(d)
        got = losses.pseudo_huber()(scale * a, scale * b)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    zero = jax.grad(lambda a: losses.pseudo_huber()(a, b).sum())(b)
    np.testing.assert_array_equal(zero, jnp.zeros_like(b))
    grid = grids.trailing(SCHEDULE, 8)
    make = losses.consistency_training
    # A network that spoils what is masked changes nothing.
    spoilt = lambda p, x, t, c: linear_network(p, x, t, c) + 1e3 * (1 - mask)  # noqa: E731
    batch = {"x0": X0, "mask": mask}
    one, _ = make(linear_network, grid, predictions.v)(0.3, jax.random.key(0), batch)
    other, _ = make(spoilt, grid, predictions.v)(0.3, jax.random.key(0), batch)
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("kind", ["training", "distillation"])
def test_the_loss_of_an_example_does_not_depend_on_the_batch(kind):
    grid, key, x0 = grids.trailing(SCHEDULE, 8), jax.random.key(0), X0[:, 0, 0, :1]
    if kind == "training":
        loss = losses.consistency_training(
            linear_network, grid, predictions.v, probabilities=losses.lognormal_steps(grid)
        )
    else:
        loss = losses.consistency_distillation(
            linear_network, gaussian_teacher, solvers.heun(), grid, predictions.v
        )
    loss = jax.jit(loss)
    whole, _ = loss(0.3, key, {"x0": x0})
    assert whole.dtype == jnp.float32
    for first in (0, 2, 4):
        batch = {"x0": x0[first : first + 2], "index": jnp.arange(first, first + 2)}
        np.testing.assert_allclose(loss(0.3, key, batch)[0], whole[first : first + 2], rtol=1e-5)


def test_steps_are_drawn_with_their_probabilities():
    grid = grids.trailing(SCHEDULE, 8)
    lognormal = losses.lognormal_steps(grid, -1.1, 2.0)
    ratio = np.float64(grid.sigma) / np.float64(grid.alpha)
    with np.errstate(divide="ignore"):
        below = stats.norm.cdf(np.log(ratio), -1.1, 2.0)
    expected = (below[:-1] - below[1:]) / below[0]
    np.testing.assert_allclose(lognormal, expected, rtol=1e-6)
    num, bound = 20000, stats.norm.isf(FALSE_ALARM / 2 / 24)
    holes = np.array([0, 0.5, 0, 0.25, 0, 0.25, 0, 0])
    for given, chances in ((None, np.full(8, 1 / 8)), (lognormal, lognormal), (holes, holes)):
        loss = losses.consistency_training(linear_network, grid, predictions.v, probabilities=given)
        _, aux = jax.jit(loss)(0.3, jax.random.key(0), {"x0": jnp.zeros((num, 1))})
        counts = (np.asarray(aux["t"])[:, None] == np.asarray(grid.t[:-1])).sum(0)
        error = bound * np.sqrt(num * chances * (1 - chances))
        assert counts.sum() == num
        assert np.all(np.abs(counts - num * chances) <= error + 1e-9)


def draw(denoiser, solver, grid, num=20000):
    """States after each step, `(N, num)`, from true samples at the first node."""

    @jax.jit
    def run():
        keys = rng.per_example(jax.random.key(0), jnp.arange(num))
        noise = rng.normal(rng.stream(keys, rng.Stream.START), (1,))
        x = grid.alpha[0] * GAUSSIAN.sample(jax.random.key(1), num) + grid.sigma[0] * noise
        _, record = sampling.walk(keys, denoiser, solver, grid, x, trajectory_every=1)
        return record.x[..., 0], record.evaluations

    x, evaluations = run()
    assert int(evaluations) == grid.t.shape[0] - 1
    return np.float64(x)


def worst_score(states, grid):
    """The largest standard score of mean and variance against the process, and its bound."""
    scores = []
    for x, (a, s) in zip(states, points(grid)[1:], strict=True):
        var = a**2 * STD**2 + s**2
        scores += [
            abs(x.mean() - a * MEAN) / np.sqrt(var / x.size),
            abs(x.var(ddof=1) / var - 1) / np.sqrt(2 / x.size),
        ]
    return max(scores), stats.norm.isf(FALSE_ALARM / 2 / len(scores))


def exact_function(sigma_min=0.0):
    def denoiser(x, node):
        node = node.over(x)
        slope = np.hypot(STD, sigma_min) / jnp.sqrt(node.alpha**2 * STD**2 + node.sigma**2)
        return Prediction(MEAN + slope * (x - node.alpha * MEAN))

    return denoiser


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_samples_of_the_exact_function_have_the_marginals_of_the_process(num_steps):
    grid = grids.trailing(SCHEDULE, num_steps)
    score, bound = worst_score(draw(exact_function(), solvers.consistency(), grid), grid)
    assert score < bound
    # A denoiser is no consistency function, whose samples are too narrow.
    score, bound = worst_score(draw(GAUSSIAN.denoiser, solvers.consistency(), grid), grid)
    assert score > 3 * bound


def test_a_sampler_knows_where_the_trajectories_end():
    # Where they end at noise of 0.3, this much is in f already, and stays in the last sample.
    grid = exploding([5.0, 1.0, 0.5, 0.3])
    score, bound = worst_score(draw(exact_function(0.3), solvers.consistency(0.3), grid), grid)
    assert score < bound
    score, bound = worst_score(draw(exact_function(0.3), solvers.consistency(), grid), grid)
    assert score > 3 * bound


def test_samples_by_a_distilled_table():
    # The whole way: the composition of DDIM steps, as a network, in one step from noise to data.
    grid = grids.trailing(SCHEDULE, 12)
    table = jnp.asarray(ddim_table(grid), jnp.float32)
    student = losses.consistency_denoiser(tabular(grid), table, SCHEDULE, predictions.v)
    args = jax.random.key(3), (64, 1)
    one_step = sampling.sample(
        args[0], student, solvers.consistency(), grid[np.array([0, 12])], args[1]
    )
    teacher = sampling.sample(args[0], GAUSSIAN.denoiser, solvers.ddim(), grid, args[1])
    np.testing.assert_allclose(one_step, teacher, rtol=0, atol=1e-5)


def test_zero_signal_at_the_start_is_no_trouble():
    grid = grids.trailing(ZERO_SNR, 5)
    for name in ("v", "flow", "edm"):
        loss = losses.consistency_training(linear_network, grid, ROWS[name], weighting=None)
        value = jax.value_and_grad(lambda p: loss(p, jax.random.key(0), {"x0": X0})[0].sum())  # noqa: B023
        assert np.isfinite(jax.tree.leaves(value(0.3))).all()


def test_bad_arguments_are_refused():
    grid = grids.trailing(SCHEDULE, 4)
    make = partial(losses.consistency_training, linear_network)
    with pytest.raises(ValueError, match="x0 prediction does not leave clean data as it is"):
        make(grid, predictions.x0)
    with pytest.raises(ValueError, match="x0 prediction"):
        losses.consistency_denoiser(linear_network, 0.0, SCHEDULE, predictions.x0)
    with pytest.raises(ValueError, match="singular"):
        losses.consistency_denoiser(linear_network, 0.0, ZERO_SNR, predictions.eps)
    with pytest.raises(ValueError, match="singular"):
        make(grids.trailing(ZERO_SNR, 4), predictions.eps, weighting=None)
    with pytest.raises(ValueError, match="weighting=None does not"):
        make(grids.trailing(ZERO_SNR, 4), predictions.v)
    with pytest.raises(ValueError, match="sigma_min is 0"):
        make(grid[:-1], predictions.v)
    with pytest.raises(ValueError, match="sigma_min must be finite and not negative"):
        make(grid, predictions.v, sigma_min=-0.1)
    with pytest.raises(ValueError, match="cleaner than the one before"):
        make(grid[::-1], predictions.v)
    for probabilities in ([0.5, 0.5], [0.5, 0.5, 0.5, -0.5], [0.1, 0.1, 0.1, 0.1]):
        with pytest.raises(ValueError, match=r"probabilities must be \(4,\)"):
            make(grid, predictions.v, probabilities=probabilities)
    with pytest.raises(ValueError, match="c must be positive"):
        losses.pseudo_huber(0.0)
    with pytest.raises(ValueError, match="std must be positive"):
        losses.lognormal_steps(grid, std=0.0)
    with pytest.raises(ValueError, match="no step of the grid is likely"):
        losses.lognormal_steps(exploding([4.0, 1.0]), mean=-100.0, std=0.1)
    with pytest.raises(TypeError, match="x0 must be floating"):
        make(grid, predictions.v)(0.3, jax.random.key(0), {"x0": np.zeros((2, 4), np.uint8)})
    with pytest.raises(ValueError, match="sigma_min must not be negative"):
        solvers.consistency(-1.0)
