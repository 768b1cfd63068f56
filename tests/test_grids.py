"""Grids: which indices are visited, and that bad step counts are refused."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff import grids, schedules

ALL = {"trailing": grids.trailing, "leading": grids.leading, "linspace": grids.linspace}


@pytest.mark.parametrize("spacing", ALL.values(), ids=ALL)
@given(data=st.data())
def test_any_number_of_steps_gives_a_grid_from_noise_to_data(spacing, data):
    total = data.draw(st.integers(1, 300))
    num_steps = data.draw(st.integers(1, total))
    schedule = schedules.linear(total, 1e-4, 0.02)
    grid = spacing(schedule, num_steps)
    t = np.asarray(grid.t)
    assert t.shape == (num_steps + 1,)
    assert np.all(np.diff(t) < 0)
    assert t[0] <= total - 1
    assert t[-1] == -1
    assert (np.asarray(grid.alpha)[-1], np.asarray(grid.sigma)[-1]) == (1.0, 0.0)
    for of_grid, of_schedule in (
        (grid.alpha, schedule.nodes.alpha), (grid.sigma, schedule.nodes.sigma)
    ):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(of_grid)[:-1], np.asarray(of_schedule)[t[:-1]])
    # Strides differ by at most one, so no part of the schedule is left out.
    strides = np.diff(t[:-1])
    assert not strides.size or strides.max() - strides.min() <= 1
    if num_steps == total:
        np.testing.assert_array_equal(t, np.arange(total - 1, -2, -1))


def test_spacings_are_those_of_the_literature():
    # Lin et al. 2023, table 2 (their t counts from 1).
    schedule = schedules.linear()
    tables = {
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    }
    for name, expected in tables.items():
        np.testing.assert_array_equal(ALL[name](schedule, 10).t[:-1] + 1, expected)


def test_one_step_starts_where_noise_is():
    schedule = schedules.linear()
    assert grids.trailing(schedule, 1).t.tolist() == [999, -1]
    assert grids.linspace(schedule, 1).t.tolist() == [999, -1]


def test_a_grid_can_end_before_clean_data():
    grid = grids.trailing(schedules.linear(), 10, clean=False)
    assert grid.t.shape == (10,)
    assert int(grid.t[-1]) == 99
    assert float(grid.sigma[-1]) > 0


@pytest.mark.parametrize("spacing", ALL.values(), ids=ALL)
@pytest.mark.parametrize("num_steps", [0, -1, 11, 2.5, True, None])
def test_bad_step_counts_are_refused(spacing, num_steps):
    with pytest.raises(ValueError, match="integer from 1 to the schedule's 10"):
        spacing(schedules.linear(10), num_steps)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [1, 2], [10, 0], [5, -1], [2.5], [[1]]])
def test_bad_timesteps_are_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must"):
        grids.from_timesteps(schedules.linear(10), timesteps)


def test_a_traced_schedule_is_refused_with_the_cure():
    with pytest.raises(ValueError, match="close over the schedule"):
        jax.jit(lambda s: grids.trailing(s, 5))(schedules.linear(10))
    # Made inside a compiled function, a grid is still made of constants.
    assert jax.jit(lambda: grids.trailing(schedules.linear(10), 5).t)().shape == (6,)
