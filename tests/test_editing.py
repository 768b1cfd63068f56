"""Editing on data whose denoiser is exact: inversion, SDEdit, inpainting, interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import denoisers, editing, grids, rng, sample, sampling, schedules, solvers
from jaxdiff.base import Prediction

LINEAR, FLOW = schedules.linear(), schedules.rectified_flow()
MEAN, STD = 0.6, 0.4
GAUSSIAN = denoisers.gaussian([MEAN], [STD])
MIXTURE = denoisers.gaussian_mixture(
    [0.5, 0.3, 0.2], np.array([[0.0], [1.0], [-0.6]]), [0.2, 0.1, 0.3]
)
FALSE_ALARM = 1e-6  # of each statistical test


def keys_of(num, seed=0):
    return rng.per_example(jax.random.key(seed), jnp.arange(num))


def round_trip(exact, grid, x0, **options):
    @jax.jit
    def run(x0):
        latent, record = editing.invert(
            exact.denoiser, grid, x0, trajectory_every=grid.t.shape[0], **options
        )
        keys = keys_of(x0.shape[0])
        again, _ = sampling.walk(keys, exact.denoiser, solvers.ddim(), grid, latent)
        return latent, again, record.evaluations

    return run(x0)


def ddim_gaussian(grid):
    """x at the last node as slope * x + offset of the first, by DDIM, in float64."""
    alpha, sigma = np.float64(grid.alpha), np.float64(grid.sigma)
    slope, offset = 1.0, 0.0
    for i in range(alpha.size - 1):
        gain = alpha[i] * STD**2 / (alpha[i] ** 2 * STD**2 + sigma[i] ** 2)
        along = sigma[i + 1] / sigma[i]
        on_x0 = alpha[i + 1] - along * alpha[i]
        a, b = along + on_x0 * gain, on_x0 * MEAN * (1 - gain * alpha[i])
        slope, offset = a * slope, a * offset + b
    return slope, offset


@pytest.mark.parametrize("schedule", [LINEAR, FLOW], ids=["linear", "flow"])
@pytest.mark.parametrize("exact", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_inversion_is_undone_by_ddim_where_the_usual_one_is_not(exact, schedule):
    grid, x0 = grids.trailing(schedule, 5), exact.sample(jax.random.key(1), 64)
    _, again, evaluations = round_trip(exact, grid, x0, iterations=15, clean_iterations=40)
    np.testing.assert_allclose(again, x0, atol=1e-5)
    assert int(evaluations) == 4 * 15 + 40
    _, again, evaluations = round_trip(exact, grid, x0, iterations=1, clean_iterations=1)
    assert np.abs(again - x0).max() > 0.05
    assert int(evaluations) == 5


def test_the_latent_is_the_one_in_closed_form():
    grid = grids.trailing(LINEAR, 100)
    x0 = GAUSSIAN.sample(jax.random.key(1), 32)
    latent, *_ = round_trip(GAUSSIAN, grid, x0)
    slope, offset = ddim_gaussian(grid)
    np.testing.assert_allclose(latent, (np.float64(x0) - offset) / slope, atol=2e-4)
    # And that is close to the flow's, along which the standard score is constant.
    alpha, sigma = float(grid.alpha[0]), float(grid.sigma[0])
    flow = alpha * MEAN + np.hypot(alpha * STD, sigma) * (np.float64(x0) - MEAN) / STD
    np.testing.assert_allclose(latent, flow, atol=0.1)
    np.testing.assert_allclose(np.corrcoef(latent[:, 0], flow[:, 0])[0, 1], 1, atol=1e-6)


def test_inversion_reaches_a_node_without_signal():
    grid = grids.trailing(schedules.zero_terminal_snr(LINEAR), 10)
    assert float(grid.alpha[0]) == 0
    x0 = GAUSSIAN.sample(jax.random.key(1), 32)
    latent, again, _ = round_trip(GAUSSIAN, grid, x0, iterations=10)
    assert np.isfinite(latent).all()
    np.testing.assert_allclose(again, x0, atol=1e-4)


def test_inversion_of_a_state_that_is_not_clean_and_of_a_batch_of_one():
    grid = grids.trailing(LINEAR, 20, clean=False)
    x = MIXTURE.sample(jax.random.key(1), 8)
    latent, again, evaluations = round_trip(MIXTURE, grid, x)
    np.testing.assert_allclose(again, x, atol=1e-4)
    assert int(evaluations) == 19 * 5
    one, *_ = round_trip(MIXTURE, grid, x[3:4])
    np.testing.assert_allclose(one, latent[3:4], atol=1e-4)


def test_slopes_below_zero_are_inverted_where_the_nodes_are_close():
    # What trained networks do in small noise: they take off more than the noise.
    def overshooting(x, node):
        return Prediction(0.3 - 0.4 * (x / node.over(x).alpha - 0.3))

    x0 = 0.3 + 0.01 * jax.random.normal(jax.random.key(5), (8, 4))

    def error(grid):
        latent = editing.invert(overshooting, grid, x0, iterations=10)
        again, _ = sampling.walk(keys_of(8), overshooting, solvers.ddim(), grid, latent)
        return float(jnp.abs(again - x0).max())

    def slopes(grid):  # eq. (3)
        alpha, r = np.float64(grid.alpha), np.float64(grid.sigma[1:] / grid.sigma[:-1])
        return (alpha[1:] - r * alpha[:-1]) * -0.4 / alpha[:-1] + r

    grid = grids.quadratic(schedules.cosine(), 200)[-12:]  # ends at data
    assert slopes(grid[:-1]).min() > 0.5
    assert error(grid[:-1]) < 1e-5
    assert slopes(grid)[-1] < 0
    assert not error(grid) < 1e-3


def test_bad_inversions_are_refused():
    grid, x0 = grids.trailing(LINEAR, 20), jnp.zeros((2, 1))
    with pytest.raises(ValueError, match="goes down all the way"):
        editing.invert(GAUSSIAN.denoiser, grids.resample(grid, 5, 2), x0)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 30"):
        editing.invert(GAUSSIAN.denoiser, grid, x0, iterations=0)
    with pytest.raises(TypeError, match="x0 must be floating"):
        editing.invert(GAUSSIAN.denoiser, grid, jnp.zeros((2, 1), int))
    with pytest.raises(ValueError, match=r"a grid needs fields \(N\+1,\)"):
        editing.invert(GAUSSIAN.denoiser, grid[3], x0)


def never(x, node):
    raise AssertionError("nothing was to be asked")


def test_image_to_image_walks_from_the_node_it_noised_to():
    grid, x0 = grids.trailing(LINEAR, 10), jnp.full((6, 4), 0.5)
    key = jax.random.key(3)
    got = editing.image_to_image(key, never, solvers.ddim(), grid, x0, 0.0)
    np.testing.assert_array_equal(got, x0)

    noise = rng.normal(rng.stream(keys_of(6, 3), rng.Stream.START), (4,))
    seen = {}

    def watched(x, node):
        jax.debug.callback(lambda x, t: seen.update({int(t): np.array(x)}), x, node.t)
        return Prediction(x)

    for strength, place in ((0.1, 9), (0.33, 7), (1.0, 0)):
        seen.clear()
        editing.image_to_image(key, watched, solvers.ddim(), grid, x0, strength)
        jax.effects_barrier()
        assert sorted(seen, reverse=True) == grid.t[place:-1].tolist()
        expected = grid.alpha[place] * x0 + grid.sigma[place] * noise
        np.testing.assert_allclose(seen[int(grid.t[place])], expected, rtol=1e-5, atol=1e-6)


def test_image_to_image_has_the_moments_of_the_closed_form():
    # From a point far off the data; the walk is affine for Gaussian data.
    grid, num, start = grids.trailing(LINEAR, 20), 4000, 2.0
    run = jax.jit(
        lambda x0: editing.image_to_image(
            jax.random.key(0), GAUSSIAN.denoiser, solvers.ddim(), grid, x0, 0.5
        )
    )
    got = np.float64(run(jnp.full((num, 1), start)))
    slope, offset = ddim_gaussian(grid[10:])
    mean = slope * float(grid.alpha[10]) * start + offset
    std = slope * float(grid.sigma[10])
    bound = stats.norm.isf(FALSE_ALARM / 4)
    assert abs(got.mean() - mean) < bound * std / np.sqrt(num)
    assert abs(got.var() / std**2 - 1) < bound * np.sqrt(2 / num)


def test_image_to_image_records_its_way():
    grid, x0 = grids.trailing(LINEAR, 10), jnp.full((2, 1), 0.5)
    args = (jax.random.key(3), GAUSSIAN.denoiser, solvers.ddim(), grid, x0)
    x, record = editing.image_to_image(*args, 0.5, trajectory_every=2)
    np.testing.assert_allclose(x, editing.image_to_image(*args, 0.5), rtol=1e-6)
    assert record.x.shape == record.x0.shape == (3, 2, 1)
    np.testing.assert_array_equal(record.x[-1], x)
    assert int(record.evaluations) == 5
    x, record = editing.image_to_image(*args, 0.0, trajectory_every=2)
    np.testing.assert_array_equal(x, x0)
    assert record.x.shape == record.x0.shape == (0, 2, 1)
    assert int(record.evaluations) == 0


def test_image_to_image_is_addressed():
    grid, x0 = grids.trailing(LINEAR, 10), jnp.linspace(-1, 1, 8)[:, None]
    args = (jax.random.key(0), MIXTURE.denoiser, solvers.ddpm(), grid)
    whole = editing.image_to_image(*args, x0, 0.6)
    part = editing.image_to_image(*args, x0[5:], 0.6, first_index=5)
    np.testing.assert_allclose(part, whole[5:], atol=1e-6)


def test_bad_strengths_are_refused():
    grid, x0 = grids.trailing(LINEAR, 10), jnp.zeros((2, 1))
    args = (jax.random.key(0), never, solvers.ddim())
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"strength must be a number in \[0, 1\]"):
            editing.image_to_image(*args, grid, x0, strength)
    with pytest.raises(ValueError, match="known outside of jit"):
        jax.jit(lambda s: editing.image_to_image(*args, grid, x0, s))(0.5)
    with pytest.raises(ValueError, match=r"a grid needs fields \(N\+1,\)"):
        editing.image_to_image(*args, grid[:1], x0, 0.5)


PIXELS = denoisers.gaussian(np.full((2, 2, 1), MEAN), STD)
MASK = jnp.array([[True, False], [False, True]])[None, :, :, None]
# With the number of evaluations in a step that does not arrive at clean data.
INNER = {
    "ddim": (solvers.ddim(), 1),
    "heun": (solvers.heun(), 2),
    "multistep": (solvers.dpm_solver_pp(), 1),
    "one_path": (solvers.sde_dpm_solver_pp(), 1),
}


@pytest.mark.parametrize("name", INNER)
def test_known_pixels_come_back_bit_by_bit(name):
    (inner, cost), grid = INNER[name], grids.resample(grids.trailing(LINEAR, 6), 2, 2)
    known = jax.random.uniform(jax.random.key(9), (5, 2, 2, 1), minval=-1)

    @jax.jit
    def compiled(known):
        solver = editing.inpaint(inner, known, MASK)
        return sample(
            jax.random.key(0), PIXELS.denoiser, solver, grid, known.shape, trajectory_every=1
        )

    x, record = compiled(known)
    mask = np.broadcast_to(MASK, x.shape)
    np.testing.assert_array_equal(np.asarray(x)[mask], np.asarray(known)[mask])
    assert np.isfinite(x).all()
    assert np.abs(np.asarray(x)[~mask] - np.asarray(known)[~mask]).min() > 1e-4
    assert int(record.evaluations) == cost * (int(np.sum(np.diff(grid.t) < 0)) - 1) + 1
    compiled(known / 2)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("name", ["ddim", "one_path"])
def test_known_pixels_are_noised_afresh_at_each_node(name):
    # At noisy nodes they have the marginal of the known value, also in a solver whose keys are the
    # same in every step; at consecutive nodes their noise is independent.
    grid, num, value = grids.trailing(LINEAR, 6), 4000, 0.7
    solver = editing.inpaint(INNER[name][0], jnp.full((1, 2), value), jnp.array([[True, False]]))
    exact = denoisers.gaussian(np.full(2, MEAN), STD)
    _, record = jax.jit(
        lambda: sample(
            jax.random.key(0), exact.denoiser, solver, grid, (num, 2), trajectory_every=1
        )
    )()
    x = np.float64(record.x[:-1, :, 0])
    noise = (x - np.float64(grid.alpha[1:-1, None]) * value) / np.float64(grid.sigma[1:-1, None])
    for z in noise:
        assert stats.kstest(z, "norm").pvalue > FALSE_ALARM / len(noise)
    correlation = np.corrcoef(noise)[np.triu_indices(len(noise), 1)]
    assert np.abs(correlation).max() < stats.norm.isf(FALSE_ALARM / 20) / np.sqrt(num)


def test_what_is_independent_of_the_known_is_drawn_as_without():
    grid, num = grids.trailing(LINEAR, 30), 4000
    exact = denoisers.gaussian(np.full(2, MEAN), STD)
    solver = editing.inpaint(solvers.ddim(), jnp.full((1, 2), 3.0), jnp.array([[1, 0]]))
    x = jax.jit(lambda: sample(jax.random.key(0), exact.denoiser, solver, grid, (num, 2)))()
    slope, offset = ddim_gaussian(grid)
    cdf = stats.norm(offset, slope * float(grid.sigma[0])).cdf
    assert stats.kstest(np.asarray(x)[:, 1], cdf).pvalue > FALSE_ALARM


def test_resampling_brings_what_is_drawn_closer_to_what_is_known():
    # Two pixels of equal sign: the known one says which, with the probability of Bayes' rule.
    # RePaint is not exact, but must be nearer; false alarm below 1e-6 for each comparison.
    exact = denoisers.gaussian_mixture([0.5, 0.5], np.array([[-1.0] * 2, [1.0] * 2]), [0.4, 0.4])
    known, num = 0.15, 4000
    share = stats.norm.pdf(known, [-1, 1], 0.4)
    share = float(share[1] / share.sum())
    positive = share * stats.norm.cdf(1 / 0.4) + (1 - share) * stats.norm.sf(1 / 0.4)
    solver = editing.inpaint(solvers.ddpm(), jnp.full((1, 2), known), jnp.array([[True, False]]))
    errors = []
    for jump_length, num_resamples in ((1, 1), (5, 10)):
        grid = grids.resample(grids.trailing(LINEAR, 50), jump_length, num_resamples)
        x = jax.jit(
            lambda grid=grid: sample(jax.random.key(0), exact.denoiser, solver, grid, (num, 2))
        )()
        errors.append(positive - np.mean(np.asarray(x)[:, 1] > 0))
    standard_error = np.sqrt(2 * 0.25 / num)
    assert errors[0] > 0.1
    assert errors[0] - errors[1] > 4.9 * standard_error
    assert errors[1] > -4.9 * standard_error


def test_bad_masks_are_refused():
    known = jnp.zeros((3, 4, 4, 1))
    for shape in ((4, 4), (3, 4, 4, 2), (2, 4, 4, 1)):
        with pytest.raises(ValueError, match="mask must have as many axes as known"):
            editing.inpaint(solvers.ddim(), known, jnp.ones(shape, bool))
    with pytest.raises(ValueError, match="boolean, or 0 and 1 only"):
        editing.inpaint(solvers.ddim(), known, jnp.full((1, 4, 4, 1), 0.5))
    with pytest.raises(ValueError, match="one that climbs"):
        editing.inpaint(editing.ddim_inversion(), known, jnp.ones((1, 4, 4, 1)))
    with pytest.raises(TypeError, match="known must be floating"):
        editing.inpaint(solvers.ddim(), known.astype(int), jnp.ones((1, 4, 4, 1)))


def test_spherical_interpolation_against_a_rotation():
    a, b = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    weight = jnp.linspace(0, 1, 5)
    got = np.float64(editing.spherical_interpolation(a, b, weight))
    for i in range(5):
        u, v = (np.float64(z[i]).ravel() for z in (a, b))
        theta = np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
        w = float(weight[i])
        expected = (np.sin((1 - w) * theta) * u + np.sin(w * theta) * v) / np.sin(theta)
        np.testing.assert_allclose(got[i].ravel(), expected, atol=1e-5)
    for w, end in ((0.0, a), (1.0, b)):
        np.testing.assert_array_equal(editing.spherical_interpolation(a, b, w), end)
    # Latents as long as noise is stay so; on the line they would lose a factor of sqrt(2).
    a, b = jax.random.normal(jax.random.key(1), (2, 3, 4000))
    length = np.linalg.norm(editing.spherical_interpolation(a, b, 0.5), axis=1)
    np.testing.assert_allclose(length, np.sqrt(4000), rtol=0.05)


def test_spherical_interpolation_of_parallel_and_opposite_latents_is_finite():
    a = jnp.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    b = jnp.array([[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
    between = lambda a: editing.spherical_interpolation(a, b, 0.25)  # noqa: E731
    np.testing.assert_allclose(between(a), [[1.25, 2.5], [0.5, 1.0], [0, 0]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda a: between(a).sum())(a)).all()
    near = editing.spherical_interpolation(a[:1], a[:1] * (1 + 1e-6), 0.5)
    np.testing.assert_allclose(near, a[:1], rtol=1e-5)


def test_bad_interpolations_are_refused():
    a = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"weight must have shape \(\) or \(3,\), got \(4,\)"):
        editing.spherical_interpolation(a, a, jnp.zeros(4))
    with pytest.raises(ValueError, match="same shape"):
        editing.spherical_interpolation(a, a[:2], 0.5)
