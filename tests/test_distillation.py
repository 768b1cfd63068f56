"""Progressive distillation: its target against two steps of DDIM, and students against teachers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import denoisers, grids, losses, predictions, rng, sampling, schedules, solvers
from jaxdiff.base import Node, Prediction

SCHEDULE = schedules.linear()
ZERO_SNR = schedules.from_alphas_bar(np.linspace(0.99, 0, 10))
GAUSSIAN = denoisers.gaussian([0.6], [0.4])
MIXTURE = denoisers.gaussian_mixture([0.4, 0.6], [[[-0.5, 0.2]], [[0.7, 0.1]]], [0.2, 0.3])
ROWS = ("x0", "eps", "v", "flow")
X0 = jax.random.normal(jax.random.key(7), (6, 1, 2))


def mixture_teacher(cond):
    return MIXTURE.denoiser


def zero_network(params, x, noise_level, cond):
    return jnp.zeros_like(x) + params


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["linear", "zero_snr"])
def test_one_ddim_step_with_the_target_arrives_where_two_steps_arrive(schedule):
    with jax.enable_x64(True):
        teacher = denoisers.gaussian_mixture([0.4, 0.6], [[-0.5, 0.2], [0.7, 0.1]], [0.2, 0.3])
        grid = grids.trailing(schedule, 10)
        grid = Node(grid.t, grid.alpha.astype(float), grid.sigma.astype(float))
        x = jax.random.normal(jax.random.key(0), (5, 2))
        keys, step = rng.per_example(jax.random.key(1), jnp.arange(5)), solvers.ddim().step
        init = solvers.ddim().init
        for i in range(0, 10, 2):
            now, mid, next = grid[i], grid[i + 1], grid[i + 2]
            state = init(x, now)
            for a, b in ((now, mid), (mid, next)):
                state, _ = step(keys, teacher.denoiser, state, a, b)
            target = losses.two_step_target(teacher.denoiser, x, now, mid, next)
            once, _ = step(keys, lambda x, n, y=target: Prediction(y), init(x, now), now, next)
            assert once.x.dtype == jnp.float64
            np.testing.assert_allclose(once.x, state.x, rtol=0, atol=1e-13)
            # And eq. (1), solved for the target as in the paper.
            ratio = next.sigma / now.sigma
            solved = (state.x - ratio * x) / (next.alpha - ratio * now.alpha)
            np.testing.assert_allclose(target, solved, rtol=0, atol=1e-11)
        np.testing.assert_allclose(target, state.x, rtol=0, atol=1e-15)  # clean on arrival
        # Nodes of their own for the examples.
        i = 2 * jnp.arange(5)
        all_at_once = losses.two_step_target(teacher.denoiser, x, grid[i], grid[i + 1], grid[i + 2])
        np.testing.assert_allclose(all_at_once[-1], target[-1], rtol=0, atol=1e-14)
        assert np.abs(all_at_once[0] - target[0]).max() > 1e-3


def test_the_target_keeps_its_digits_on_a_fine_grid():
    # 1000 steps in float32 against float64; solving eq. (1) loses about three more digits.
    def target(grid, teacher):
        i = 2 * jnp.arange(500)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(500, 1)), grid.sigma.dtype)
        return losses.two_step_target(teacher.denoiser, x, grid[i], grid[i + 1], grid[i + 2])

    grid = grids.trailing(SCHEDULE, 1000)
    got = target(grid, GAUSSIAN)
    with jax.enable_x64(True):
        wide = Node(grid.t, grid.alpha.astype(float), grid.sigma.astype(float))
        expected = target(wide, denoisers.gaussian([0.6], [0.4]))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_is_the_weighted_error_in_x0(name):
    # max(SNR, 1) |x0 of the student - target|², whatever the student predicts.
    row, key = getattr(predictions, name), jax.random.key(0)
    grid = grids.trailing(SCHEDULE, 8)
    index = jnp.arange(6)
    keys = rng.per_example(key, index)
    i = jnp.minimum((rng.uniform(rng.stream(keys, rng.Stream.TIME)) * 4).astype(int), 3)
    now, mid, next = grid[2 * i], grid[2 * i + 1], grid[2 * i + 2]
    x = now.over(X0).alpha * X0 + now.over(X0).sigma * rng.normal(
        rng.stream(keys, rng.Stream.NOISE), (1, 2)
    )
    target = losses.two_step_target(MIXTURE.denoiser, x, now, mid, next)
    student = row.x0(jnp.full_like(x, 0.3), x, now)
    error = np.float64(student - target)
    ratio = np.float64(now.alpha) ** 2 / np.float64(now.sigma) ** 2
    expected = np.maximum(ratio, 1) * (error**2).mean(axis=(1, 2))

    loss = losses.progressive_distillation(zero_network, mixture_teacher, grid, row)
    per_example, aux = loss(0.3, key, {"x0": X0})
    assert per_example.shape == (6,)
    assert per_example.dtype == jnp.float32
    np.testing.assert_array_equal(aux["t"], now.t)
    np.testing.assert_array_equal(aux["loss"], per_example)
    np.testing.assert_allclose(per_example, expected, rtol=2e-4)
    plain = losses.progressive_distillation(zero_network, mixture_teacher, grid, row, losses.unit)
    slope = (row.x0(jnp.ones_like(x), x, now) - row.x0(jnp.zeros_like(x), x, now))[:, 0, 0]
    np.testing.assert_allclose(
        plain(0.3, key, {"x0": X0})[0], (error**2).mean(axis=(1, 2)) / slope**2, rtol=2e-4
    )


def test_each_of_the_students_steps_is_as_likely():
    grid = grids.trailing(SCHEDULE, 8)
    loss = losses.progressive_distillation(zero_network, mixture_teacher, grid, predictions.v)
    _, aux = jax.jit(loss)(0.0, jax.random.key(0), {"x0": jnp.zeros((4000, 1, 2))})
    times, counts = np.unique(aux["t"], return_counts=True)
    np.testing.assert_array_equal(times[::-1], grid.t[:-1:2])
    assert np.abs(counts - 1000).max() < 5.2 * np.sqrt(750)  # false alarm below 1e-6


def test_the_loss_of_an_example_does_not_depend_on_the_batch():
    key, grid = jax.random.key(0), grids.trailing(SCHEDULE, 8)
    loss = losses.progressive_distillation(zero_network, mixture_teacher, grid, predictions.v)
    whole, _ = loss(0.0, key, {"x0": X0})
    for first in (0, 2, 4):
        batch = {"x0": X0[first : first + 2], "index": jnp.arange(first, first + 2)}
        np.testing.assert_allclose(loss(0.0, key, batch)[0], whole[first : first + 2], rtol=1e-5)


def test_teacher_and_student_see_the_condition_and_masked_coordinates_do_not_count():
    grid, key, seen = grids.trailing(SCHEDULE, 4), jax.random.key(0), {}
    cond = {"shift": jnp.arange(6.0)}

    def teacher(cond):
        return lambda x, node: Prediction(jnp.zeros_like(x) + cond["shift"][:, None, None])

    def apply_fn(params, x, noise_level, cond, dropout_keys):
        seen.update(cond=cond, t=noise_level, keys=dropout_keys)
        return jnp.zeros_like(x) + cond["shift"][:, None, None]

    def loss(*args):
        return losses.progressive_distillation(*args, predictions.x0, dropout=True)

    per_example, aux = loss(apply_fn, teacher, grid)(None, key, {"x0": X0, "cond": cond})
    np.testing.assert_allclose(per_example, 0, atol=1e-10)  # a point mass where cond says
    assert seen["cond"] is cond
    np.testing.assert_array_equal(seen["t"], aux["t"])
    expected = rng.stream(rng.per_example(key, jnp.arange(6)), rng.Stream.DROPOUT)
    np.testing.assert_array_equal(jax.random.key_data(seen["keys"]), jax.random.key_data(expected))

    def wrong(params, x, *args, **kwargs):
        return apply_fn(params, x, *args, **kwargs).at[..., 1].add(1.0)

    mask = jnp.array([1.0, 0.0])[None, None]
    batch = {"x0": X0.at[..., 1].set(jnp.nan), "cond": cond, "mask": mask}
    masked, _ = loss(wrong, teacher, grid)(None, key, batch)
    np.testing.assert_allclose(masked, 0, atol=1e-10)
    batch = {"x0": X0, "cond": cond}
    assert np.all(np.asarray(loss(wrong, teacher, grid)(None, key, batch)[0]) > 0.4)


def test_a_loss_made_inside_the_step_is_the_same_and_the_teacher_gets_no_gradient():
    grid, batch = grids.trailing(SCHEDULE, 4), {"x0": X0}

    def teacher(shift, cond):
        return lambda x, node: Prediction(MIXTURE.denoiser(x, node).x0 + shift)

    @jax.jit
    def value(params, shift):
        loss = losses.progressive_distillation(
            zero_network, partial(teacher, shift), grid, predictions.v
        )
        return loss(params, jax.random.key(0), batch)[0].sum()

    outside = losses.progressive_distillation(
        zero_network, partial(teacher, 0.1), grid, predictions.v
    )
    expected = outside(0.2, jax.random.key(0), batch)[0].sum()
    np.testing.assert_allclose(value(0.2, 0.1), expected, rtol=1e-5)
    gradient = jax.grad(value, argnums=(0, 1))(0.2, 0.1)
    assert float(gradient[0]) != 0
    assert float(gradient[1]) == 0


def affine_network(params, x, noise_level, cond):
    """A table of one affine function for each time, v prediction."""
    which = jnp.argmin(jnp.abs(noise_level[:, None] - params["t"][None]), axis=1)
    return params["slope"][which][:, None] * x + params["offset"][which][:, None]


def distil(teacher, grid, num_updates=1500):
    """Trains a table of affine functions as the student of `teacher` on `grid`, from zero."""
    times = np.float32(grid.t[:-1:2])
    params = {"slope": jnp.zeros(times.size), "offset": jnp.zeros(times.size)}
    apply_fn = lambda params, *args: affine_network({**params, "t": times}, *args)  # noqa: E731
    loss_fn = losses.progressive_distillation(
        apply_fn, lambda cond: teacher, grid, predictions.v, losses.unit
    )

    @jax.jit
    def train(params):
        def update(params, step):
            key = jax.random.fold_in(jax.random.key(0), step)
            x0 = GAUSSIAN.sample(jax.random.fold_in(jax.random.key(1), step), 64)
            gradient = jax.grad(lambda p: loss_fn(p, key, {"x0": x0})[0].mean())(params)
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient), None

        return jax.lax.scan(update, params, jnp.arange(num_updates))[0]

    return denoisers.from_network(apply_fn, train(params), SCHEDULE, predictions.v)


def test_students_of_students_take_one_step_to_where_the_teacher_takes_four():
    # On Gaussian data DDIM is affine, so that the student can be exact, and its loss zero.
    def draw(denoiser, grid):
        return sampling.sample(jax.random.key(2), denoiser, solvers.ddim(), grid, (64, 1))

    grid = grids.trailing(SCHEDULE, 4)
    expected = draw(GAUSSIAN.denoiser, grid)
    denoiser = GAUSSIAN.denoiser
    for _ in range(2):
        denoiser, grid = distil(denoiser, grid), grid[::2]
        np.testing.assert_allclose(draw(denoiser, grid), expected, rtol=0, atol=1e-3)
    assert grid.t.shape == (2,)
    undistilled = draw(GAUSSIAN.denoiser, grid)
    assert np.abs(undistilled - expected).max() > 0.3


def test_zero_signal_at_the_start_is_no_trouble():
    grid = grids.trailing(ZERO_SNR, 4)
    for name in ("x0", "v", "flow"):
        loss = losses.progressive_distillation(
            zero_network, mixture_teacher, grid, getattr(predictions, name)
        )
        per_example, _ = loss(0.0, jax.random.key(0), {"x0": X0})
        assert np.isfinite(per_example).all()


def test_bad_arguments_are_refused():
    make = partial(losses.progressive_distillation, zero_network, mixture_teacher)
    with pytest.raises(ValueError, match="2N\\+1 nodes"):
        make(grids.trailing(SCHEDULE, 5), predictions.v)
    grid = grids.trailing(SCHEDULE, 4)
    with pytest.raises(ValueError, match="cleaner than the one before it, which node 3"):
        make(grid[np.array([0, 1, 2, 1, 4])], predictions.v)
    with pytest.raises(ValueError, match="cleaner"):
        make(grid[::-1], predictions.v)
    with pytest.raises(ValueError, match=r"a grid needs fields \(N\+1,\)"):
        make(grid[0], predictions.v)
    with pytest.raises(ValueError, match="singular"):
        make(grids.trailing(ZERO_SNR, 4), predictions.eps)
    with pytest.raises(TypeError, match="x0 must be floating"):
        make(grid, predictions.v)(0.0, jax.random.key(0), {"x0": np.zeros((2, 4), np.uint8)})
