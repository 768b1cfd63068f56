"""Tests of experiments.solver_study: the solution to compare with, the counting, the tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

pytest.importorskip("ml_collections")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from experiments import build, drawing, solver_problems, solver_report, solver_study, trained
from experiments.configs import digits
from experiments.solver_study import ROWS
from jaxdiff import denoisers, grids, rng, sampling, schedules, solvers
from jaxdiff.base import Node

ROOT = Path(__file__).parents[2]
SLOW = {"probability_flow_1e-03", "probability_flow_1e-04"}  # to compile, and nothing new


@pytest.fixture(scope="module")
def problem():
    return solver_problems.mixture_problem(512, 0)


def uniform(problem):
    return solver_study.spacing("uniform_log_snr", problem.schedule, None, None)


def test_the_table_has_every_solver():
    assert {row.solver for row in ROWS.values()} == set(drawing.SOLVERS)


def test_the_closed_form_is_that_of_the_library():
    parts = solver_problems.mixture()
    y, rho = np.random.default_rng(0).normal(size=(20, 8)), 0.7
    with jax.enable_x64(True):
        exact = denoisers.gaussian_mixture(*parts)
        node = Node(jnp.float64(0.5), jnp.float64(1), jnp.float64(rho))
        expected = exact.denoiser(jnp.asarray(y), node).x0
    np.testing.assert_allclose(solver_problems.expected_x0(parts, y, rho), expected, atol=1e-12)


def test_the_flow_of_one_gaussian_keeps_its_quantiles():
    mean, std = np.linspace(-1, 1, 8)[None], np.linspace(0.2, 0.6, 8)[None]
    y = 30 * np.random.default_rng(0).normal(size=(10, 8))
    found = solver_problems.exact_flow((np.ones(1), mean, std), y, 30.0, solver_problems.CLEAN)
    # (y - m) / sqrt(s² + rho²) is constant along it.
    np.testing.assert_allclose(found, mean + std / np.hypot(std, 30) * (y - mean), atol=1e-8)


def test_the_solution_is_what_the_library_converges_to(problem):
    parts = solver_problems.mixture()
    with jax.enable_x64(True):
        schedule, few = schedules.edm(sigma_min=1e-4), slice(16)
        exact = denoisers.gaussian_mixture(*parts)
        noise = jnp.asarray(problem.noise[few], jnp.float64)
        ends = []
        for n in (500, 1000):
            grid = grids.uniform_log_snr(schedule, n, sigma_max=80.0)
            x, _ = jax.jit(
                lambda x, grid=grid: sampling.walk(
                    rng.per_example(jax.random.key(0), jnp.arange(16)),
                    exact.denoiser,
                    solvers.unipc(2),
                    grid,
                    x,
                )
            )(80.0 * noise)
            ends.append(np.asarray(x))
    found = solver_problems.exact_flow(parts, 80.0 * np.asarray(noise), 80.0, solver_problems.CLEAN)
    errors = [solver_problems.rms(end - found) for end in ends]
    assert errors[1] < 3e-7, errors
    assert errors[1] < errors[0] / 4, errors


@pytest.mark.parametrize("name", sorted(ROWS.keys() - SLOW))
def test_each_solver_takes_as_many_steps_as_the_budget_is_enough_for(problem, name):
    few = problem._replace(
        noise=problem.noise[:16],
        solution=lambda first: solver_problems.Solution(problem.solution(first).samples[:16], 0.0),
        data=lambda number: problem.data(number)[:16],
    )
    row, budget = ROWS[name], 14
    (point,) = solver_study.points(few, row, uniform(problem), [budget])
    if row.solver == "probability_flow":
        assert point["budget"] is None
        assert point["evaluations"] > 20
    else:
        assert budget - 2 < point["evaluations"] <= budget
        assert list(solver_study.points(few, row, uniform(problem), [row.least - 1])) == []
    assert ("error" in point) == (not row.random)
    assert 0 < point["distance"] < 1
    assert row.random or 1e-4 < point["error"] < 0.5


def test_at_20_evaluations_multistep_solvers_are_ten_times_closer_than_ddim(problem):
    found = solver_study.study(
        problem, ["ddim", "unipc_3", "deis_4"], {"uniform_log_snr": uniform(problem)}, [20]
    )
    here = found["spacings"]["uniform_log_snr"]
    assert here["closest_multistep"]["20"]["times_closer_than_ddim"] > 10
    # The comparison is of the solvers: neither the last move nor rounding has a part in it.
    best = here["points"]["deis_4"][0]["error"]
    assert here["last_move"]["20"] < best / 10
    assert here["floor"] < best / 500
    assert found["exact_samples"]["mean"] < found["exact_samples"]["most"] < 0.1


def test_sliced_wasserstein_of_a_shift():
    draw = np.random.default_rng(0)
    a, shift = draw.normal(size=(500, 8)), draw.normal(size=8)
    # The mean square of its parts along directions is |shift|² / 8.
    expected = np.linalg.norm(shift) / np.sqrt(8)
    found = solver_study.sliced_wasserstein(a, a[::-1] + shift)
    assert abs(found / expected - 1) < 0.2
    assert solver_study.sliced_wasserstein(a, draw.permutation(a)) < 1e-12


def test_the_report_is_of_the_numbers():
    def point(budget, error, evaluations=None):
        return {"budget": budget, "evaluations": evaluations or budget, "error": error}

    kinds = {"ddim": {}, "a": {"multistep": True}, "heun": {}, "flow": {"adaptive": True}}
    kinds |= {"noisy": {"random": True}}
    plain = {"multistep": False, "adaptive": False, "random": False}
    points = {
        "ddim": [{**point(10, 0.4), "distance": 0.5}, {**point(20, 0.2), "distance": 0.25}],
        "a": [point(20, 0.01)],
        "heun": [point(10, 0.1, 9), point(20, 0.05, 19)],
        "flow": [{"budget": None, "evaluations": 33, "error": 0.003}],
        "noisy": [{"budget": 20, "evaluations": 20, "distance": 0.125}],
    }
    here = {"floor": 1e-6, "points": points, "last_move": {"10": 1e-3, "20": 2e-3}}
    here["closest_multistep"] = solver_report.closest(points, ["a"], [10, 20])
    assert here["closest_multistep"] == {
        "20": {"solver": "a", "times_closer_than_ddim": pytest.approx(20)}
    }
    found = {
        "problem": "a problem",
        "budgets": [10, 20],
        "solvers": {name: {"family": name, **plain, **kind} for name, kind in kinds.items()},
        "spacings": {"karras": here},
        "exact_samples": {"sets": 8, "mean": 0.03, "most": 0.04},
    }
    fixed, adaptive, random = solver_report.tables(found)
    assert fixed.rows == [
        ["ddim", "4.00e-01 (1)", "2.00e-01 (1)"],
        ["a", "-", "1.00e-02 (20)"],
        ["heun", "1.00e-01 (4) @9", "5.00e-02 (4) @19"],
        ["(exact up to the last move)", "1.00e-03", "2.00e-03"],
    ]
    assert adaptive.rows == [["flow", 33, "3.00e-03"]]
    assert random.rows == [["ddim", "5.00e-01", "2.50e-01"], ["noisy", "-", "1.25e-01"]]
    assert "3.0e-02 in the mean of 8 sets, 4.0e-02 at most" in random.caption
    assert [line.split(":")[0] for line in solver_report.findings(found)] == [
        "karras, 20 evaluations"
    ]
    # A second spacing that suits ddim better.
    other = {**points, "ddim": [points["ddim"][0], {**points["ddim"][1], "error": 0.1}]}
    other["a"] = [point(20, 0.02)]
    found["spacings"]["beta"] = {**here, "points": other}
    assert solver_report.findings(found)[-1] == (
        "20 evaluations, each on its best spacing: a on karras is 10 times closer than ddim on beta"
    )
    lines = solver_report.text(found).splitlines()
    assert "a                            -                1.00e-02 (20)" in lines
    curves = solver_report.curves(found, "karras")
    assert curves.keys() == {"ddim", "a", "heun", "flow"}
    np.testing.assert_array_equal(curves["heun"], [[9, 19], [0.1, 0.05]])
    image = solver_report.picture(found)
    assert image.dtype == np.uint8
    assert image.shape == (550, 1350, 3)


def test_command_end_to_end(tmp_path):
    out = tmp_path / "deep" / "out"
    command = [sys.executable, "-m", "experiments.solver_study", f"--out={out}"]
    options = ["--evaluations=12,6", "--solvers=unipc_2,ddpm", "--num=200"]
    options += ["--grid=karras"]
    result = subprocess.run(
        command + options, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    assert sorted(path.name for path in out.iterdir()) == ["study.html", "study.json", "study.png"]
    found = json.loads((out / "study.json").read_text())
    assert found["budgets"] == [6, 12]
    assert list(found["spacings"]) == ["karras"]
    assert found["solvers"].keys() == {"ddim", "unipc_2", "ddpm"}
    for here in found["spacings"].values():
        assert [point["evaluations"] for point in here["points"]["unipc_2"]] == [6, 12]
        errors = [point["error"] for point in here["points"]["ddim"]]
        assert errors[1] < errors[0] < 0.5
    assert result.stdout.startswith("a mixture of 5 Gaussians in 8 dimensions")
    assert "karras, 12 evaluations: the closest multistep solver is unipc_2" in result.stdout
    assert "solver" not in result.stderr, "no progress bar where there is no terminal"
    page = (out / "study.html").read_text()
    assert "data:image/png;base64," in page
    assert "unipc_2" in page


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--solvers=unipc_4"], "solvers must be one of ddim.*'unipc_4': did you mean"),
        (["--evaluations=10,x"], "integers of at least 2.*got 10,x"),
        (["--evaluations=1,10"], "integers of at least 2.*got 1,10"),
        (["--solvers=ddpm", "--workdir=here"], "ddpm draws noise.*without --workdir"),
    ],
)
def test_wrong_options_are_named(monkeypatch, options, match):
    values = flags.FlagValues()
    solver_study.define_flags(values)
    values(["solver_study", *options])
    monkeypatch.setattr(solver_study, "FLAGS", values)
    with pytest.raises(ValueError, match=match):
        solver_study.choices()


def test_wrong_spacings_are_named(problem):
    with pytest.raises(
        ValueError, match=r"grid must be one of.*got 'karas': did you mean 'karras'"
    ):
        solver_study.spacing("karas", problem.schedule, None, None)
    with pytest.raises(ValueError, match="grid=trailing takes no sigma_min"):
        solver_study.spacing("trailing", problem.schedule, None, 0.1)(10)


def test_spacings_by_noise_start_at_80_unless_the_schedule_or_the_user_says_less():
    def first(schedule, sigma_max):
        grid = solver_study.spacing("karras", schedule, sigma_max, None)(4)
        return float(grid.sigma[0] / grid.alpha[0])

    assert first(schedules.linear(), None) == pytest.approx(80, rel=1e-5)
    assert first(schedules.linear(), 20.0) == pytest.approx(20, rel=1e-5)
    assert first(schedules.edm(sigma_max=30.0), None) == pytest.approx(30, rel=1e-5)


@pytest.fixture
def untrained(monkeypatch):
    """A run that `trained.load` finds: a tiny network whose last layer is not zero."""
    config = digits.get_config()
    config.model.update({"channels": 8, "channel_multipliers": (1,)})
    config.schedule.name = "linear"
    init, _ = build.make_training(config, (8, 8, 1))
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.1 * draw.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(init).params,
    )
    monkeypatch.setattr(trained, "load", lambda *args, **kwargs: (config, params, (8, 8, 1), 7))
    return config, params


def test_of_a_network_it_is_the_run_s_own_samples(untrained):
    config, params = untrained
    problem = solver_problems.network_problem(Path("run"), num=4, seed=3, reference_steps=60)
    assert "step 7, 4 samples" in problem.about
    found, evaluations = solver_problems.walk(problem, solvers.ddim(), uniform(problem)(30))
    options = {"solver": "ddim", "grid": "uniform_log_snr", "grid_options": {"sigma_max": 80.0}}
    config.sample.update({**options, "steps": 30, "seed": 3, "batch_size": 4, "threshold": "none"})
    drawn = drawing.make_draw(config, (8, 8, 1))(params, 0)
    assert evaluations == 30
    np.testing.assert_allclose(found, drawn, atol=1e-5)

    study = solver_study.study(
        problem, ["ddim", "dpm_solver_pp_3m"], {"noise": uniform(problem)}, [30]
    )
    here = study["spacings"]["noise"]
    ddim, best = (here["points"][name][0]["error"] for name in ("ddim", "dpm_solver_pp_3m"))
    assert here["floor"] < best < ddim / 2, (here["floor"], best, ddim)
    assert "distance" not in here["points"]["ddim"][0]
    assert "(exact up to the last move)" not in solver_report.text(study)


def test_self_conditioned_networks_are_refused(untrained):
    config, _ = untrained
    config.self_condition = True
    with pytest.raises(ValueError, match=r"self-conditioned network.*no probability flow"):
        solver_problems.network_problem(Path("run"), num=4, seed=0)
