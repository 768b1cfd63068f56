"""The sampling loop: addresses, trajectories, chunks, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff import denoisers, grids, rng, sample, sampling, schedules, solvers

SCHEDULE = schedules.linear()
EXACT = denoisers.gaussian_mixture(
    [0.5, 0.5], np.stack([np.full((4, 4, 1), v) for v in (-1, 1)]), [0.2, 0.2]
)
GRID = grids.trailing(SCHEDULE, 20)


def drawer(size, solver=solvers.ddpm(), key=3, denoiser=EXACT.denoiser, **jit):  # noqa: B008
    return jax.jit(
        lambda first: sample(
            jax.random.key(key), denoiser, solver, GRID, (size, 4, 4, 1), first_index=first
        ),
        **jit,
    )


@pytest.fixture(scope="module")
def hundred():
    return np.concatenate(list(sampling.in_batches(drawer(50), 100)))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_batch_size_changes_nothing(hundred, size):
    batches = list(sampling.in_batches(drawer(size), 100))
    assert [len(b) for b in batches] == [size] * (100 // size) + [100 % size] * (100 % size > 0)
    np.testing.assert_allclose(np.concatenate(batches), hundred, atol=1e-5)


def test_a_part_is_the_part_of_the_whole(hundred):
    part = np.concatenate(list(sampling.in_batches(drawer(8), 20, first_index=40)))
    np.testing.assert_allclose(part, hundred[40:60], atol=1e-5)


def test_the_number_of_devices_changes_nothing(hundred):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    rows = NamedSharding(mesh, PartitionSpec("data"))
    draw = drawer(40, out_shardings=rows)
    assert len(draw(0).sharding.device_set) == 8
    got = np.concatenate(list(sampling.in_batches(draw, 100)))
    np.testing.assert_allclose(got, hundred, atol=1e-5)


def test_seeds_differ_and_solvers_start_alike(hundred):
    assert np.abs(drawer(50, key=4)(0) - hundred[:50]).max() > 0.1
    # One step from the same noise: with eta 0 and 1 the first prediction is the same.
    records = [
        sample(jax.random.key(0), EXACT.denoiser, solver, GRID, (2, 4, 4, 1), trajectory_every=1)[1]
        for solver in (solvers.ddpm(), solvers.ddim())
    ]
    np.testing.assert_array_equal(records[0].x0[0], records[1].x0[0])


def test_no_recompilation_for_other_indices():
    traced = []

    def denoiser(x, node):
        traced.append(x)
        return EXACT.denoiser(x, node)

    draw = drawer(5, denoiser=denoiser)
    draw(0)
    once = len(traced)
    for first in range(5, 20, 5):
        draw(first)
    assert len(traced) == once > 0


@pytest.mark.parametrize("every", [1, 6, 20, 100])
def test_a_thinned_trajectory_is_the_trajectory_thinned(every):
    run = jax.jit(
        lambda every: sample(
            jax.random.key(0), EXACT.denoiser, solvers.ddpm(), GRID, (2, 4, 4, 1),
            trajectory_every=every,
        ),
        static_argnums=0,
    )  # fmt: skip
    x, whole = run(1)
    assert int(whole.evaluations) == 20
    np.testing.assert_array_equal(whole.x[-1], x)
    _, record = run(every)
    kept = np.minimum(np.arange(every, 20 + every, every), 20) - 1
    np.testing.assert_allclose(record.x, whole.x[kept], atol=1e-5)
    np.testing.assert_allclose(record.x0, whole.x0[kept], atol=1e-5)


def test_a_sample_starts_from_the_noise_of_the_first_node():
    grid = GRID[:1], GRID[:2]
    keys = rng.per_example(jax.random.key(0), jnp.arange(3))
    noise = rng.normal(rng.stream(keys, rng.Stream.START), (4, 4, 1))
    x, _ = sampling.walk(keys, EXACT.denoiser, solvers.ddim(), grid[1], grid[1].sigma[0] * noise)
    got = sample(jax.random.key(0), EXACT.denoiser, solvers.ddim(), grid[1], (3, 4, 4, 1))
    np.testing.assert_allclose(got, x, rtol=1e-6)


def test_the_compiled_program_does_not_grow_with_the_number_of_steps():
    sizes = []
    for num_steps in (10, 1000):
        grid = grids.trailing(SCHEDULE, num_steps)
        lowered = jax.jit(
            lambda key, grid=grid: sample(key, EXACT.denoiser, solvers.ddpm(), grid, (64, 4, 4, 1))
        ).lower(jax.random.key(0))
        memory = lowered.compile().memory_analysis()
        text = lowered.as_text()
        sizes.append((text.count("\n"), memory.temp_size_in_bytes))
    assert sizes[0][0] == sizes[1][0]
    # The grid itself is data; a state of the batch takes 4 KiB.
    assert sizes[1][1] - sizes[0][1] < 3 * 4 * 1001


def test_bad_arguments_are_refused():
    args = (EXACT.denoiser, solvers.ddim())
    with pytest.raises(TypeError, match="typed key"):
        sample(jax.random.PRNGKey(0), *args, GRID, (2, 4, 4, 1))
    with pytest.raises(ValueError, match=r"shape must be \(B"):
        sample(jax.random.key(0), *args, GRID, (2,))
    for grid in (GRID[0], GRID[:1]):
        with pytest.raises(ValueError, match=r"a grid needs fields \(N\+1,\)"):
            sample(jax.random.key(0), *args, grid, (2, 4, 4, 1))
    with pytest.raises(ValueError, match="trajectory_every must be at least 1"):
        sample(jax.random.key(0), *args, GRID, (2, 4, 4, 1), trajectory_every=0)
    with pytest.raises(ValueError, match="must not be negative"):
        list(sampling.in_batches(drawer(2), -1))
    assert list(sampling.in_batches(drawer(2), 0)) == []
